"""The kernels as custom operators, so that they run under fake tensors, `torch.compile` and opcheck."""

import torch
from torch import Tensor

from tokenseek_kernels.custom_op import custom_op
from tokenseek_kernels.lean_norm import triton
from tokenseek_kernels.lean_norm.reference import compute_dtype


@custom_op("tokenseek::rms_norm_forward")
def rms_norm_forward(
    x: Tensor, weight: Tensor | None, eps: float, offset: float, cast_before_weight: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`y` in `dtype`, and one over the root mean square of each row."""
    return triton.rms_norm_forward(x, weight, eps, offset, cast_before_weight, dtype)


@rms_norm_forward.register_fake
def _(x, weight, eps, offset, cast_before_weight, dtype):
    return x.new_empty(x.shape, dtype=dtype), _one_a_row(x)


@custom_op("tokenseek::layer_norm_forward")
def layer_norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`y`, mean and one over the standard deviation of each row."""
    return triton.layer_norm_forward(x, weight, bias, eps)


@layer_norm_forward.register_fake
def _(x, weight, bias, eps):
    return x.new_empty(x.shape), _one_a_row(x), _one_a_row(x)


@custom_op("tokenseek::norm_backward")
def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    offset: float,
    needs_x: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = triton.backward(grad, x, weight, mean, rstd, offset, (needs_x, needs_weight, needs_bias))
    # operators return tensors: an empty one stands for a gradient that nobody asked for
    return tuple(rstd.new_empty(0) if gradient is None else gradient for gradient in gradients)


@_backward.register_fake
def _(grad, x, weight, mean, rstd, offset, needs_x, needs_weight, needs_bias):
    sums = (rstd.new_empty(x.shape[-1] if needed else 0) for needed in (needs_weight, needs_bias))
    return x.new_empty(x.shape) if needs_x else rstd.new_empty(0), *sums


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, offset: float, needs: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight, those that `needs` asks for."""
    return _backward(grad, x, weight, None, rstd, offset, *needs, False)[:2]


def layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, those that `needs` asks for."""
    return _backward(grad, x, weight, mean, rstd, 0.0, *needs)


def _one_a_row(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1].numel(), dtype=compute_dtype(x))
