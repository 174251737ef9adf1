"""Memory: what autograd keeps for backward, everything that is alive, and what a run will need."""

from .live import LiveMemory
from .phases import phase
from .saved import SavedActivations, other_hooks_active

# imported on first use: they need the methods, which need the above
_HOMES = {
    "Estimate": "estimation",
    "MemoryTracker": "tracker",
    "Peak": "peaks",
    "Training": "training",
    "affordable_ratio": "budget",
    "estimate": "estimation",
    "first_fitting": "plan",
    "try_ways": "plan",
}

__all__ = [
    "Estimate",
    "LiveMemory",
    "MemoryTracker",
    "Peak",
    "SavedActivations",
    "Training",
    "affordable_ratio",
    "estimate",
    "first_fitting",
    "other_hooks_active",
    "phase",
    "try_ways",
]


def __getattr__(name: str):
    import importlib

    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}. Public names: {__all__}.")
