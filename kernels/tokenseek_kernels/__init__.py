"""Tensor operations of hf_tokenseek. Pure torch; knows nothing of transformers."""

from .attention_mass import attention_mass
from .lean_lora import lora_delta, seeded_dropout
from .lean_mlp import ACTIVATIONS, activated_linear, gated_activation, gated_linear
from .lean_norm import layer_norm, rms_norm
from .linear_cross_entropy import HeadStatistics, head_statistics, linear_cross_entropy
from .selected_attention import causal_attention, selected_attention
from .velora_linear import compress, compressed_linear, expand, gated_activation_compress, rms_norm_compress

__all__ = [
    "ACTIVATIONS",
    "HeadStatistics",
    "activated_linear",
    "attention_mass",
    "causal_attention",
    "compress",
    "compressed_linear",
    "expand",
    "gated_activation",
    "gated_activation_compress",
    "gated_linear",
    "head_statistics",
    "layer_norm",
    "linear_cross_entropy",
    "lora_delta",
    "rms_norm",
    "rms_norm_compress",
    "seeded_dropout",
    "selected_attention",
]
