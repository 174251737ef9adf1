"""Tensors as rows of features."""

from torch import Tensor


def as_rows(tensor: Tensor) -> Tensor:
    """
    `(..., width)` -> `(rows, width)` with neighbouring features side by side, which kernels address by one row stride.

    A view wherever one exists, such as for a slice of a wider matrix; else, as for an expanded gradient, a copy.
    """
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(-1) == 1 and rows.stride(0) >= rows.shape[1] else rows.contiguous()
