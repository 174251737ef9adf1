"""Importance-aware sparse tuning: only some layers train at a time, and the others cost no gradient and no state."""

from .config import IstConfig

__all__ = ["IstConfig"]
