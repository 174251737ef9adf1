"""Callbacks for any `Trainer`."""

from .lean import LeanCallback
from .logging import LoggedMetrics
from .memory import MemoryCallback
from .seek import SeekCallback

__all__ = ["LeanCallback", "LoggedMetrics", "MemoryCallback", "SeekCallback"]
