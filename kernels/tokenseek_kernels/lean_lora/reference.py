"""The formula of README.md, written as PEFT writes it, and the mask. Autograd differentiates it."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# dropout is a multiple of one over this
LEVELS = 2**16


def dropped_elements(shape: Sequence[int], device: torch.device, dropout: float, seed: int) -> Tensor:
    """
    Which elements dropout zeroes: a mask that follows from its arguments, and is the same every time.

    An element is dropped if 16 random bits of its own are below `dropout`. Four of them share one random number, so
    that drawing the mask twice takes less time on a CPU than drawing a number for each element once.
    """
    numel = math.prod(shape)
    generator = torch.Generator(device).manual_seed(seed)
    words = torch.empty((numel + 3) // 4, dtype=torch.int64, device=device)
    bits = words.random_(-(2**63), None, generator=generator).view(torch.int16)[:numel]
    return bits.view(shape) < dropped_levels(dropout) - LEVELS // 2


def dropped_levels(dropout: float) -> int:
    """How many of the levels are dropped."""
    return round(dropout * LEVELS)


def kept_share(dropout: float) -> float:
    """The share of elements that dropout keeps, as it is after rounding."""
    return 1 - dropped_levels(dropout) / LEVELS


def lora_delta(
    x: Tensor, a: Tensor, b: Tensor, scaling: float, dropout: float, seed: int | None, dtype: torch.dtype
) -> Tensor:
    """`scaling * B A drop(x)`, in `dtype`."""
    x = x.to(dtype)
    if dropout:
        dropped = dropped_elements(x.shape, x.device, dropout, seed)
        x = x.masked_fill(dropped, 0) / kept_share(dropout)
    return F.linear(F.linear(x, a.to(dtype)), b.to(dtype)) * scaling
