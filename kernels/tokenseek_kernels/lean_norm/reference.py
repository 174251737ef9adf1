"""The formulas of README.md, written as the models write them. Autograd differentiates them."""

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """float32, or float64 for float64 inputs: the dtype of means, of what is saved a row, and of sums."""
    return torch.promote_types(x.dtype, torch.float32)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float, cast_before_weight: bool) -> Tensor:
    """Each row over its root mean square, times `offset + weight`."""
    states = x.to(compute_dtype(x))
    normed = states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return normed.to(x.dtype)
    if cast_before_weight:
        return (offset + weight) * normed.to(x.dtype)
    return (normed * (offset + weight.to(normed.dtype))).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Each row less its mean, over its standard deviation, times `weight`, plus `bias`."""
    states = x.to(compute_dtype(x))
    centered = states - states.mean(-1, keepdim=True)
    y = centered * torch.rsqrt(centered.pow(2).mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(y.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.to(x.dtype)
