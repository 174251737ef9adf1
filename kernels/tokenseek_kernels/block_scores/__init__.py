from .function import block_scores

__all__ = ["block_scores"]
