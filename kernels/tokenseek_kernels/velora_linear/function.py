"""The doors and autograd."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokenseek_kernels.dispatch import resolve_up_to
from tokenseek_kernels.precision import linear_dtype
from tokenseek_kernels.velora_linear import reference
from tokenseek_kernels.velora_linear.projection import as_matrix

# features of a sub-token that Triton's programs hold in registers; torch takes longer ones
WIDEST = 8192


class _Options(NamedTuple):
    size: int
    dtype: torch.dtype
    observe: Callable[[Tensor, Tensor], None] | None


class CompressedLinearFunction(torch.autograd.Function):
    """Saves z, which all consumers of an input share, and the weight, a parameter; never x.

    Kept for backward: `groups * rank * itemsize` bytes a row once for all layers with the same z, and the directions.
    Nothing of size `rows x width` is made in backward but the gradient of x itself.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        carrier: Tensor | None,
        z: Tensor,
        expansion: Tensor,
        options: _Options,
    ) -> Tensor:
        needs_x, needs_weight, _, needs_carrier, *_ = ctx.needs_input_grad
        is_trained = needs_weight or needs_carrier
        compressed = (z, expansion) if is_trained else (None, None)
        # a probe compares with the exact gradient, and keeps x for that one step
        exact = x if is_trained and options.observe is not None else None
        ctx.save_for_backward(weight if needs_x else None, *compressed, exact)
        ctx.options = options
        dtype = options.dtype
        # cast here and not by autocast, whose cache would hand this weight, without its graph, to everybody else
        return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        weight, z, expansion, exact = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_carrier, *_ = ctx.needs_input_grad
        grads = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_bias = compressed = None
        with torch.autocast(grad.device.type, enabled=False):
            if needs_x:
                grad_x = (grads @ weight.to(grads.dtype)).view(*grad.shape[:-1], weight.shape[1])
            if needs_weight or needs_carrier:
                compressed = grads.T @ z.reshape(-1, z.shape[-1]).to(grads.dtype)
            if needs_weight or exact is not None:
                grad_weight = compressed @ as_matrix(expansion, ctx.options.size, grads.dtype).T
            if needs_bias:
                grad_bias = grads.sum(0)
            if exact is not None:
                ctx.options.observe(grad_weight, grads.T @ exact.reshape(-1, exact.shape[-1]).to(grads.dtype))
        return (
            grad_x,
            grad_weight if needs_weight else None,
            grad_bias,
            compressed if needs_carrier else None,
            None,
            None,
            None,
        )


def compress(x: Tensor, directions: Tensor, size: int, *, impl: str = "auto") -> Tensor:
    """The scalar products of each row's sub-tokens with the directions of their group. Not differentiable.

    Args:
        x (`torch.Tensor` of shape `(..., width)`):
            Any floating dtype; under autocast it is computed in the autocast dtype.
        directions (`torch.Tensor` of shape `(rank, width)`):
            The directions of all groups side by side, float32 (float64 for a float64 `x`).
        size (`int`):
            Features of a sub-token; the last one of a row may be shorter.
        impl (`str`, *optional*, defaults to `"auto"`):
            `"auto"`, `"triton"` (sub-tokens of up to 8192 features), `"torch"` or `"reference"`.

    Returns:
        `torch.Tensor`: `(..., groups * rank)`, group by group, `groups = ceil(width / size)`; dtype of `x`, or the
        autocast dtype. Summed in float32.

    Raises:
        ValueError: shapes do not fit together, `size` is not in `[1, width]`, or `impl` is unknown.
    """
    check_directions(x, directions, size)
    impl, dtype = resolve_up_to(WIDEST, impl, x, size), linear_dtype(x)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        x = x.to(dtype)
        if impl == "reference":
            return reference.compress(x, directions, size)
        if impl == "torch":
            return x @ as_matrix(directions, size, x.dtype)
        from tokenseek_kernels.velora_linear import operators

        return operators.compress(x, directions, size)


def compressed_linear(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    expansion: Tensor,
    size: int,
    *,
    carrier: Tensor | None = None,
    observe: Callable[[Tensor, Tensor], None] | None = None,
) -> Tensor:
    """A linear layer whose weight gradient is computed from `z` in place of `x`.

    Differentiable once in `x` and `bias`, exactly, and in `weight` and `carrier`, from `z`. Saves `z`, not `x`.

    Args:
        x (`torch.Tensor` of shape `(..., width)`):
            Any floating dtype. Computed in the weight's dtype, under autocast in the autocast dtype.
        z (`torch.Tensor` of shape `(..., groups * rank)`):
            From [`compress`]; one for all layers that read the same `x`.
        weight (`torch.Tensor` of shape `(out, width)`):
            A frozen one gets no gradient, and `z` is then kept for `carrier` only.
        bias (`torch.Tensor` of shape `(out,)`, *optional*):
            Likewise.
        expansion (`torch.Tensor` of shape `(rank, width)`):
            The directions times their factors: 1 for an orthogonal projection, more for an unbiased one.
        size (`int`):
            As in [`compress`].
        carrier (`torch.Tensor` of shape `(out, groups * rank)`, *optional*):
            Gets the compressed gradient `dy^T z`; its values are not used.
        observe (`Callable`, *optional*):
            Called in backward with the compressed and the exact gradient of the weight; `x` is kept for it.

    Returns:
        `torch.Tensor`: `(..., out)`.

    Raises:
        ValueError: shapes do not fit together or `size` is not in `[1, width]`.
    """
    check_directions(x, expansion, size)
    columns = -(-x.shape[-1] // size) * expansion.shape[0]
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1] or z.shape != (*x.shape[:-1], columns):
        raise ValueError(
            f"`x` [..., width], `weight` [out, width] and `z` [..., {columns}] do not fit together: got "
            f"{list(x.shape)}, {list(weight.shape)} and {list(z.shape)}."
        )
    if carrier is not None and carrier.shape != (weight.shape[0], columns):
        raise ValueError(f"`carrier` must have shape {[weight.shape[0], columns]}, got {list(carrier.shape)}.")
    options = _Options(size, linear_dtype(weight), observe)
    return CompressedLinearFunction.apply(x, weight, bias, carrier, z, expansion, options)


def check_directions(x: Tensor, directions: Tensor, size: int) -> None:
    """Refuses directions that do not fit `x`, and sub-tokens of no feature or more than `x` has."""
    if directions.dim() != 2 or x.dim() == 0 or directions.shape[1] != x.shape[-1]:
        raise ValueError(
            f"`x` [..., width] and directions [rank, width] do not fit together: got {list(x.shape)} and "
            f"{list(directions.shape)}."
        )
    if not 1 <= size <= x.shape[-1]:
        raise ValueError(f"`size` must be in [1, {x.shape[-1]}], the width of `x`, got {size}.")
