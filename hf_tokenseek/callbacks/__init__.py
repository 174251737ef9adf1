"""Callbacks for any `Trainer`."""

from .ist import IstCallback
from .lean import LeanCallback
from .lemo import LemoCallback
from .logging import LoggedMetrics
from .memory import MemoryCallback
from .report import ReportCallback
from .seek import SeekCallback
from .stateful import StatefulCallback
from .velora import VeloraCallback

__all__ = [
    "IstCallback",
    "LeanCallback",
    "LemoCallback",
    "LoggedMetrics",
    "MemoryCallback",
    "ReportCallback",
    "SeekCallback",
    "StatefulCallback",
    "VeloraCallback",
]
