"""The doors of what makes a layer's input and, while it is at hand, compresses it."""

import torch
from torch import Tensor

from tokenseek_kernels.dispatch import resolve_up_to
from tokenseek_kernels.lean_mlp.function import GatedActivationFunction, check_states, gated_activation
from tokenseek_kernels.lean_norm.function import RMSNormFunction, RMSOptions, check_inputs, output_dtype, rms_norm
from tokenseek_kernels.precision import linear_dtype, linear_dtype_of
from tokenseek_kernels.velora_linear.function import WIDEST, check_directions, compress


class RMSNormCompressFunction(torch.autograd.Function):
    """Saves what `RMSNormFunction` saves, and has its backward: z is not differentiated."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, options: RMSOptions, directions: Tensor, size: int):
        from tokenseek_kernels.velora_linear import operators

        eps, offset, cast_before_weight, _ = options
        dtype = output_dtype(x, weight, cast_before_weight)
        y, z, rstd = operators.rms_norm_compress(
            x, weight, eps, offset, cast_before_weight, dtype, directions, size, linear_dtype_of(dtype, x.device)
        )
        ctx.save_for_backward(x, weight, rstd)
        ctx.options = options
        ctx.mark_non_differentiable(z)
        return y, z

    @staticmethod
    def backward(ctx, grad: Tensor, _):
        return *RMSNormFunction.backward(ctx, grad), None, None


class GatedActivationCompressFunction(torch.autograd.Function):
    """Saves what `GatedActivationFunction` saves, and has its backward: z is not differentiated."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor | None, activation: str, impl: str, directions: Tensor, size: int):
        from tokenseek_kernels.velora_linear import operators

        product, z = operators.gated_activation_compress(gate, up, activation, directions, size, linear_dtype(gate))
        ctx.save_for_backward(gate, up)
        ctx.activation, ctx.impl = activation, impl
        ctx.mark_non_differentiable(z)
        return product, z

    @staticmethod
    def backward(ctx, grad: Tensor, _):
        return *GatedActivationFunction.backward(ctx, grad), None, None


def rms_norm_compress(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    directions: Tensor,
    size: int,
    *,
    offset: float = 0.0,
    cast_before_weight: bool = True,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """[`rms_norm`] and [`compress`] of its result, in one pass where Triton runs.

    Differentiable once in `x` and `weight`, as [`rms_norm`] is and with what it saves; the second result is not.

    Args:
        x (`torch.Tensor` of shape `(..., width)`):
            Any floating dtype.
        weight (`torch.Tensor` of shape `(width,)`, *optional*):
            Any floating dtype.
        eps (`float`):
            Added to the mean square.
        directions (`torch.Tensor` of shape `(rank, width)`):
            As in [`compress`].
        size (`int`):
            Features of a sub-token.
        offset (`float`, *optional*, defaults to 0.0):
            As in [`rms_norm`].
        cast_before_weight (`bool`, *optional*, defaults to `True`):
            As in [`rms_norm`].
        impl (`str`, *optional*, defaults to `"auto"`):
            `"auto"`, `"triton"` (up to 8192 features), `"torch"` or `"reference"`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: what [`rms_norm`] returns, and what [`compress`] makes of it.

    Raises:
        ValueError: what [`rms_norm`] and [`compress`] raise.
    """
    check_inputs(x, weight=weight)
    check_directions(x, directions, size)
    if resolve_up_to(WIDEST, impl, x, x.shape[-1]) == "triton" and _row_fits(x, size):
        options = RMSOptions(eps, offset, cast_before_weight, "triton")
        return RMSNormCompressFunction.apply(x, weight, options, directions, size)
    y = rms_norm(x, weight, eps, offset=offset, cast_before_weight=cast_before_weight, impl=impl)
    return y, compress(y, directions, size, impl=impl)


def gated_activation_compress(
    gate: Tensor, up: Tensor | None, activation: str, directions: Tensor, size: int, *, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """[`gated_activation`] and [`compress`] of its result, in one pass where Triton runs.

    Differentiable once in `gate` and `up`, as [`gated_activation`] is and with what it saves; the second result is
    not.

    Args:
        gate (`torch.Tensor` of shape `(..., width)`):
            Any floating dtype.
        up (`torch.Tensor`, *optional*):
            Same shape and dtype; without it, the activation alone.
        activation (`str`):
            `"silu"`, `"gelu"`, `"gelu_tanh"`, `"relu"` or `"relu2"`.
        directions (`torch.Tensor` of shape `(rank, width)`):
            As in [`compress`].
        size (`int`):
            Features of a sub-token.
        impl (`str`, *optional*, defaults to `"auto"`):
            `"auto"`, `"triton"` (sub-tokens of up to 8192 features), `"torch"` or `"reference"`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: what [`gated_activation`] returns, and what [`compress`] makes of it.

    Raises:
        ValueError: what [`gated_activation`] and [`compress`] raise.
    """
    check_states(gate, up, None, activation)
    check_directions(gate, directions, size)
    if resolve_up_to(WIDEST, impl, gate, size) == "triton":
        return GatedActivationCompressFunction.apply(gate, up, activation, "triton", directions, size)
    product = gated_activation(gate, up, activation, impl=impl)
    return product, compress(product, directions, size, impl=impl)


def _row_fits(x: Tensor, size: int) -> bool:
    """Padding makes a row of odd sub-tokens up to four times as long."""
    from tokenseek_kernels.velora_linear import triton

    return triton.row_elements(x.shape[-1], size) <= WIDEST
