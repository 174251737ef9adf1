"""Rows of a residual stream, and the RMS norm that a layer's projections see them through."""

from .function import split_normed_rows

__all__ = ["split_normed_rows"]
