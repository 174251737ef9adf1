"""VeLoRA: linear layers that keep a few numbers a token of their input instead of the input."""

from .config import VeloraConfig
from .optimizer import VeloraAdamW

__all__ = ["VeloraAdamW", "VeloraConfig"]
