"""Tensor operations of hf_tokenseek. Pure torch; knows nothing of transformers."""

from .attention_mass import attention_mass
from .linear_cross_entropy import HeadStatistics, head_statistics, linear_cross_entropy
from .selected_attention import causal_attention, selected_attention

__all__ = [
    "HeadStatistics",
    "attention_mass",
    "causal_attention",
    "head_statistics",
    "linear_cross_entropy",
    "selected_attention",
]
