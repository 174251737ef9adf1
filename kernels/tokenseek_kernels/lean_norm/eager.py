"""
Plain torch. An RMS norm works on a block of rows while it is in the cache: no float32 copy of the whole input exists.

The rows of a layer norm are left to torch's own kernels, but not the weight gradient of 16-bit rows, which torch sums
in 16 bits.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from tokenseek_kernels.lean_norm.reference import compute_dtype

# of a block, of which two or three float32 copies are alive at once: what a cache holds, or a GPU is busy with
CPU_BLOCK, GPU_BLOCK = 2**17, 2**23
# more rows make larger blocks rather than more of them
MAX_BLOCKS = 64


def rms_norm_forward(
    x: Tensor, weight: Tensor | None, eps: float, offset: float, cast_before_weight: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`y` in `dtype`, and one over the root mean square of each row."""
    rows, compute = x.reshape(-1, x.shape[-1]), compute_dtype(x)
    y = rows.new_empty(rows.shape, dtype=dtype)
    rstd = rows.new_empty(len(rows), dtype=compute)
    scale = None if weight is None else offset + (weight if cast_before_weight else weight.to(compute))
    for block in _blocks(rows):
        states = rows[block].to(compute)
        torch.rsqrt(states.square().mean(-1).add_(eps), out=rstd[block])
        normed = states * rstd[block, None]
        if scale is None or not cast_before_weight:
            y[block] = normed if scale is None else normed.mul_(scale)
        else:
            y[block] = normed.to(x.dtype)
            y[block].mul_(scale)
    return y.view(x.shape), rstd


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, offset: float, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and weight, those that `needs` asks for."""
    rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, x.shape[-1])
    scale = None if weight is None else offset + weight.to(rstd.dtype)
    grad_x = x.new_empty(x.shape) if needs[0] else None
    grad_weight = rstd.new_zeros(rows.shape[1]) if needs[1] else None
    for block in _blocks(rows):
        states, grad_block = rows[block].to(rstd.dtype), grads[block].to(rstd.dtype)
        product = grad_block * states
        if needs[1]:
            grad_weight.addmv_(product.T, rstd[block])
        if needs[0]:
            dots = product.sum(-1) if scale is None else product @ scale
            slope = dots.mul_(rstd[block].pow(3)).div_(-rows.shape[1])
            torch.mul(grad_block, rstd[block, None], out=product)
            if scale is not None:
                product.mul_(scale)
            grad_x.view(rows.shape)[block] = product.addcmul_(states, slope[:, None])
    return grad_x, grad_weight


def layer_norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`y`, mean and one over the standard deviation of each row."""
    rows = x.reshape(-1, x.shape[-1])
    bias = None if bias is None else bias.to(compute_dtype(x))
    y, mean, rstd = torch.native_layer_norm(rows, rows.shape[1:], _wide_weight(x, weight), bias, eps)
    return y.view(x.shape), mean.flatten(), rstd.flatten()


def layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias, those that `needs` asks for."""
    rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, x.shape[-1])
    wide = x.dtype == rstd.dtype
    grad_x, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grads,
        rows,
        rows.shape[1:],
        mean[:, None],
        rstd[:, None],
        _wide_weight(x, weight),
        # the bias is asked for its dtype only
        mean.new_empty(rows.shape[1]) if needs[2] else None,
        (needs[0], needs[1] and wide, needs[2] and wide),
    )
    if not wide:
        grad_weight, grad_bias = _layer_norm_sums(grads, rows, mean, rstd, needs[1:])
    return None if grad_x is None else grad_x.view(x.shape), grad_weight, grad_bias


def _layer_norm_sums(
    grads: Tensor, rows: Tensor, mean: Tensor, rstd: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of weight and bias, in float32."""
    grad_weight, grad_bias = (mean.new_zeros(rows.shape[1]) if needed else None for needed in needs)
    for block in _blocks(rows):
        grad_block = grads[block].to(mean.dtype)
        if needs[1]:
            grad_bias += grad_block.sum(0)
        if needs[0]:
            grad_weight.addmv_((grad_block * (rows[block] - mean[block, None])).T, rstd[block])
    return grad_weight, grad_bias


def _wide_weight(x: Tensor, weight: Tensor | None) -> Tensor | None:
    """In float32: torch's kernel then keeps mean and rstd of 16-bit rows in float32 as well."""
    compute = compute_dtype(x)
    if weight is not None:
        return weight.to(compute)
    return None if x.dtype == compute else x.new_ones(x.shape[-1], dtype=compute)


def _blocks(rows: Tensor) -> Iterator[slice]:
    elements = CPU_BLOCK if rows.device.type == "cpu" else GPU_BLOCK
    step = max(1, elements // max(1, rows.shape[1]), math.ceil(len(rows) / MAX_BLOCKS))
    for start in range(0, len(rows), step):
        yield slice(start, start + step)
