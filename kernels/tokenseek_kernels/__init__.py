"""Tensor operations of hf_tokenseek. Pure torch; knows nothing of transformers."""

from .attention_mass import attention_mass
from .block_scores import block_scores
from .lean_lora import lora_delta, seeded_dropout
from .lean_mlp import ACTIVATIONS, activated_linear, gated_activation, gated_linear
from .lean_norm import layer_norm, rms_norm
from .linear_cross_entropy import HeadStatistics, head_statistics, linear_cross_entropy
from .normed_rows import split_normed_rows
from .selected_attention import causal_attention, selected_attention
from .token_rows import join_rows, split_rows
from .velora_linear import compress, compressed_linear, expand, gated_activation_compress, rms_norm_compress

__all__ = [
    "ACTIVATIONS",
    "HeadStatistics",
    "activated_linear",
    "attention_mass",
    "block_scores",
    "causal_attention",
    "compress",
    "compressed_linear",
    "expand",
    "gated_activation",
    "gated_activation_compress",
    "gated_linear",
    "head_statistics",
    "join_rows",
    "layer_norm",
    "linear_cross_entropy",
    "lora_delta",
    "rms_norm",
    "rms_norm_compress",
    "seeded_dropout",
    "selected_attention",
    "split_normed_rows",
    "split_rows",
]
