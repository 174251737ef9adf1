"""Directions as the matrix of a projection, for torch's matrix products."""

import torch
from torch import Tensor


def as_matrix(directions: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """
    `(rank, width)` -> `(width, groups * rank)`, block-diagonal: `x @ matrix` compresses, `z @ matrix.T` expands.

    Made when it is used and dropped: a product with it reads x once and leaves no temporary as wide as x, which an
    elementwise product and a sum would. It has `width * groups * rank` elements (192 KiB for 1,536 features in 32
    groups, float32), and takes as many products a row; with hundreds of groups that is a layer of its own.
    """
    rank, width = directions.shape
    groups = -(-width // size)
    first = torch.arange(width, device=directions.device) // size * rank
    columns = first[:, None] + torch.arange(rank, device=directions.device)
    matrix = torch.zeros(width, groups * rank, dtype=dtype, device=directions.device)
    return matrix.scatter_(1, columns, directions.T.to(dtype))
