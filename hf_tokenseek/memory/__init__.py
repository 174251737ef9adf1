"""Memory, measured: what autograd keeps for backward, and everything that is alive."""

from .live import LiveMemory
from .saved import SavedActivations, other_hooks_active

__all__ = ["LiveMemory", "SavedActivations", "other_hooks_active"]
