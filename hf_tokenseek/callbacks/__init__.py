"""Callbacks for any `Trainer`."""

from .ist import IstCallback
from .lean import LeanCallback
from .logging import LoggedMetrics
from .memory import MemoryCallback
from .seek import SeekCallback
from .stateful import StatefulCallback
from .velora import VeloraCallback

__all__ = [
    "IstCallback",
    "LeanCallback",
    "LoggedMetrics",
    "MemoryCallback",
    "SeekCallback",
    "StatefulCallback",
    "VeloraCallback",
]
