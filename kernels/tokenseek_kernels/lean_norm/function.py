"""The one door: argument checks and autograd."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokenseek_kernels.dispatch import resolve_up_to
from tokenseek_kernels.lean_norm import eager, reference

# features of a row that Triton's programs hold in registers; torch takes wider rows
WIDEST = 8192


class RMSOptions(NamedTuple):
    """What [`rms_norm`] was called with beside its tensors; `impl` is resolved."""

    eps: float
    offset: float
    cast_before_weight: bool
    impl: str


class RMSNormFunction(torch.autograd.Function):
    """Saves x and one float32 number a row, from which backward has the normalised row without another reduction.

    Kept for backward beside the weight, a parameter: `width * itemsize + 4` bytes a row.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, options: RMSOptions) -> Tensor:
        eps, offset, cast_before_weight, impl = options
        dtype = output_dtype(x, weight, cast_before_weight)
        y, rstd = _implementation(impl).rms_norm_forward(x, weight, eps, offset, cast_before_weight, dtype)
        ctx.save_for_backward(x, weight, rstd)
        ctx.options = options
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, rstd = ctx.saved_tensors
        needs, options = ctx.needs_input_grad[:2], ctx.options
        # in an autocast block too, what looks like a matrix product here is a float32 sum
        with torch.autocast(x.device.type, enabled=False):
            gradients = _implementation(options.impl).rms_norm_backward(grad, x, weight, rstd, options.offset, needs)
        return *_wanted(gradients, needs), None


class LayerNormFunction(torch.autograd.Function):
    """Saves x and two float32 numbers a row, from which backward has the normalised row without another reduction.

    Kept for backward beside the weight, a parameter: `width * itemsize + 8` bytes a row.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, impl: str) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            y, mean, rstd = _implementation(impl).layer_norm_forward(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.impl = impl
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, mean, rstd = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        with torch.autocast(x.device.type, enabled=False):
            gradients = _implementation(ctx.impl).layer_norm_backward(grad, x, weight, mean, rstd, needs)
        return *_wanted(gradients, needs), None, None


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    offset: float = 0.0,
    cast_before_weight: bool = True,
    impl: str = "auto",
) -> Tensor:
    """Each row of `x` over its root mean square, times `offset + weight`, as the models' own classes compute it.

    Differentiable once in `x` and `weight`. Saved a row: `x` and 4 bytes.

    Args:
        x (`torch.Tensor` of shape `(..., width)`):
            Any floating dtype. Normalised in float32 (float64 if that is its dtype).
        weight (`torch.Tensor` of shape `(width,)`, *optional*):
            Any floating dtype. `None` for a norm without a weight.
        eps (`float`):
            Added to the mean square.
        offset (`float`, *optional*, defaults to 0.0):
            Added to the weight: 1.0 for Gemma's.
        cast_before_weight (`bool`, *optional*, defaults to `True`):
            Whether the normalised row is rounded to the dtype of `x` before it is multiplied by the weight (Llama), in
            which case torch promotes the product; else it is multiplied in float32, then rounded (Gemma, OLMo 2).
        impl (`str`, *optional*, defaults to `"auto"`):
            `"auto"`, `"triton"` (up to 8192 features), `"torch"` or `"reference"`.

    Returns:
        `torch.Tensor`: shape and dtype of `x`; with `cast_before_weight` the dtype that `x` and `weight` promote to.

    Raises:
        ValueError: On a weight that does not fit `x`, a dtype that is not floating, or an `impl` that is unknown or
            cannot run on `x`.
    """
    check_inputs(x, weight=weight)
    impl = resolve_up_to(WIDEST, impl, x, x.shape[-1])
    if impl == "reference":
        return reference.rms_norm(x, weight, eps, offset, cast_before_weight)
    return RMSNormFunction.apply(x, weight, RMSOptions(eps, offset, cast_before_weight, impl))


def output_dtype(x: Tensor, weight: Tensor | None, cast_before_weight: bool) -> torch.dtype:
    """Of an RMS norm: where the cast comes before the product with the weight, torch promotes the product."""
    promotes = cast_before_weight and weight is not None
    return torch.promote_types(x.dtype, weight.dtype) if promotes else x.dtype


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, impl: str = "auto") -> Tensor:
    """Each row of `x` less its mean, over its standard deviation, times `weight`, plus `bias`.

    Differentiable once in `x`, `weight` and `bias`. Saved a row: `x` and 8 bytes.

    Args:
        x (`torch.Tensor` of shape `(..., width)`):
            Any floating dtype. Normalised in float32 (float64 if that is its dtype), weight and bias included.
        weight (`torch.Tensor` of shape `(width,)`, *optional*):
            Any floating dtype.
        bias (`torch.Tensor` of shape `(width,)`, *optional*):
            Any floating dtype.
        eps (`float`):
            Added to the variance.
        impl (`str`, *optional*, defaults to `"auto"`):
            `"auto"`, `"triton"` (up to 8192 features), `"torch"` or `"reference"`.

    Returns:
        `torch.Tensor`: shape and dtype of `x`, under autocast too.

    Raises:
        ValueError: On a weight or bias that does not fit `x`, a dtype that is not floating, or an `impl` that is
            unknown or cannot run on `x`.
    """
    check_inputs(x, weight=weight, bias=bias)
    impl = resolve_up_to(WIDEST, impl, x, x.shape[-1])
    if impl == "reference":
        return reference.layer_norm(x, weight, bias, eps)
    return LayerNormFunction.apply(x, weight, bias, eps, impl)


def _implementation(impl: str):
    """The module that computes; Triton is imported when it is first needed."""
    if impl == "torch":
        return eager
    from tokenseek_kernels.lean_norm import operators

    return operators


def _wanted(gradients: tuple[Tensor | None, ...], needs: tuple[bool, ...]) -> Iterator[Tensor | None]:
    """The gradients asked for, `None` for the others. Autograd rounds float32 sums to the dtype of their parameter."""
    return (gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True))


def check_inputs(x: Tensor, **parameters: Tensor | None) -> None:
    """Refuses an `x` or parameters, by name, that are not floating or do not fit together."""
    if x.dim() == 0 or not x.is_floating_point():
        raise ValueError(f"`x` must be floating point of shape [..., width], got {x.dtype} of shape {list(x.shape)}.")
    for name, parameter in parameters.items():
        if parameter is not None and (parameter.shape != x.shape[-1:] or not parameter.is_floating_point()):
            raise ValueError(
                f"`{name}` must be floating point of shape [{x.shape[-1]}], one per feature of `x`, got "
                f"{parameter.dtype} of shape {list(parameter.shape)}. Use `None` for a norm without one."
            )
