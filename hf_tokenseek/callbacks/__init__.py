"""Callbacks for any `Trainer`."""

from .logging import LoggedMetrics
from .memory import MemoryCallback
from .seek import SeekCallback

__all__ = ["LoggedMetrics", "MemoryCallback", "SeekCallback"]
