"""The second half of an MLP, with its activation computed again in backward instead of kept."""

from tokenseek_kernels.lean_mlp.activations import ACTIVATIONS
from tokenseek_kernels.lean_mlp.function import activated_linear, gated_activation, gated_linear

__all__ = ["ACTIVATIONS", "activated_linear", "gated_activation", "gated_linear"]
