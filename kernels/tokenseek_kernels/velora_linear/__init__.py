"""A linear layer that keeps a few numbers a token of its input instead of the input (VeLoRA)."""

from tokenseek_kernels.velora_linear.function import compress, compressed_linear
from tokenseek_kernels.velora_linear.fused import gated_activation_compress, rms_norm_compress
from tokenseek_kernels.velora_linear.reference import expand

__all__ = ["compress", "compressed_linear", "expand", "gated_activation_compress", "rms_norm_compress"]
