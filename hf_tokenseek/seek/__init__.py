from .config import SeekConfig

__all__ = ["SeekConfig"]
