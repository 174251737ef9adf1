"""The kernels as custom operators, so that they run under fake tensors, `torch.compile` and opcheck."""

import torch
from torch import Tensor

from tokenseek_kernels.custom_op import custom_op
from tokenseek_kernels.lean_norm.reference import compute_dtype
from tokenseek_kernels.velora_linear import triton


@custom_op("tokenseek::compress")
def compress(x: Tensor, directions: Tensor, size: int) -> Tensor:
    """`(..., width)` -> `(..., groups * rank)`, in the dtype of x."""
    return triton.compress(x, directions, size)


@compress.register_fake
def _(x, directions, size):
    return triton.empty_compressed(x, directions, size, x.dtype)


@custom_op("tokenseek::rms_norm_compress")
def rms_norm_compress(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float,
    cast_before_weight: bool,
    dtype: torch.dtype,
    directions: Tensor,
    size: int,
    z_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """`y` in `dtype`, z from y as a layer in `z_dtype` reads it, and one over the root mean square of each row."""
    return triton.rms_norm_compress(x, weight, eps, offset, cast_before_weight, dtype, directions, size, z_dtype)


@rms_norm_compress.register_fake
def _(x, weight, eps, offset, cast_before_weight, dtype, directions, size, z_dtype):
    rstd = x.new_empty(x.shape[:-1].numel(), dtype=compute_dtype(x))
    return x.new_empty(x.shape, dtype=dtype), triton.empty_compressed(x, directions, size, z_dtype), rstd


@custom_op("tokenseek::gated_activation_compress")
def gated_activation_compress(
    gate: Tensor, up: Tensor | None, activation: str, directions: Tensor, size: int, z_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`act(gate) * up`, or `act(gate)`, and z from it as a layer in `z_dtype` reads it."""
    return triton.gated_activation_compress(gate, up, activation, directions, size, z_dtype)


@gated_activation_compress.register_fake
def _(gate, up, activation, directions, size, z_dtype):
    return gate.new_empty(gate.shape), triton.empty_compressed(gate, directions, size, z_dtype)
