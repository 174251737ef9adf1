"""Lean layers: the same norms, MLPs and LoRA linears, exact, saving only what backward cannot recompute."""

from .attach import LeanHandle, check_tiles

__all__ = ["LeanHandle", "check_tiles"]
