from .config import LemoConfig

__all__ = ["LemoConfig", "calibrate", "search_thresholds"]

_HOMES = {"calibrate": "calibration", "search_thresholds": "thresholds"}


def __getattr__(name: str):
    import importlib

    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}. Public names: {__all__}.")
