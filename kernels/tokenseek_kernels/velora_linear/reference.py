"""The formulas of README.md, written out. Only torch, and no regard for memory."""

import torch.nn.functional as F
from torch import Tensor


def compress(x: Tensor, directions: Tensor, size: int) -> Tensor:
    """`z[..., g * rank + k]`: the scalar product of sub-token g with direction k of its group."""
    products = x.unsqueeze(-2) * directions.to(x.dtype)
    missing = -x.shape[-1] % size
    padded = F.pad(products, (0, missing)).unflatten(-1, (-1, size)).sum(-1)
    return padded.transpose(-1, -2).flatten(-2)


def expand(compressed: Tensor, directions: Tensor, size: int) -> Tensor:
    """`(..., groups * rank)` -> `(..., width)`: the sum over k of each group's numbers times its directions."""
    rank, width = directions.shape
    each = compressed.unflatten(-1, (-1, rank)).repeat_interleave(size, dim=-2)[..., :width, :]
    return (each * directions.to(compressed.dtype).T).sum(-1)


def weight_gradient(grad: Tensor, x: Tensor, directions: Tensor, expansion: Tensor, size: int) -> Tensor:
    """The gradient of the weight with the input rebuilt in full, as the paper writes it."""
    rebuilt = expand(compress(x, directions, size), expansion, size)
    return grad.flatten(0, -2).T @ rebuilt.flatten(0, -2)
