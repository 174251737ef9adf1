"""Cross entropy of a linear head, and what the head says about each row, one chunk of logits at a time."""

from tokenseek_kernels.linear_cross_entropy.function import HeadStatistics, head_statistics, linear_cross_entropy

__all__ = ["HeadStatistics", "head_statistics", "linear_cross_entropy"]
