"""Callbacks for any `Trainer`."""

from .lean import LeanCallback
from .logging import LoggedMetrics
from .memory import MemoryCallback
from .seek import SeekCallback
from .velora import VeloraCallback

__all__ = ["LeanCallback", "LoggedMetrics", "MemoryCallback", "SeekCallback", "VeloraCallback"]
