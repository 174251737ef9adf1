"""Plain torch: the functions of the rows and of the norm, one after the other."""

import torch
from torch import Tensor

from ..lean_norm.eager import rms_norm_backward, rms_norm_forward
from ..token_rows.eager import gather_rows, write_rows_


def gather_normed_rows(
    states: Tensor,
    rows: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float,
    cast_before_weight: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows, their normed values in `dtype`, and one over the root mean square of each."""
    kept = gather_rows(states, rows)
    return kept, *rms_norm_forward(kept, weight, eps, offset, cast_before_weight, dtype)


def write_normed_gradients_(
    grad: Tensor,
    grad_kept: Tensor,
    grad_normed: Tensor,
    kept: Tensor,
    rows: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    offset: float,
    needs_weight: bool,
) -> Tensor | None:
    """Writes the gradient of the rows over those of `grad`; gives that of the weight, if it is asked for."""
    fresh, grad_weight = rms_norm_backward(grad_normed, kept, weight, rstd, offset, (True, needs_weight))
    write_rows_(grad, fresh.add_(grad_kept), rows)
    return grad_weight
