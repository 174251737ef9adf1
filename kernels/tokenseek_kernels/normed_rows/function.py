"""Rows out of a residual stream together with what a layer's first norm makes of them: door, autograd, custom ops."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..custom_op import custom_op
from ..dispatch import resolve_up_to
from ..lean_norm.function import WIDEST, check_inputs, output_dtype
from ..lean_norm.reference import compute_dtype, rms_norm
from ..token_rows.function import SplitsRows, check_rows, dense_copy
from ..token_rows.reference import split_rows_reference
from . import eager


class _Options(NamedTuple):
    eps: float
    offset: float
    cast_before_weight: bool
    impl: str


@custom_op("tokenseek::gather_normed_rows")
def _gather_op(
    states: Tensor,
    rows: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float,
    cast_before_weight: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows, their normed values in `dtype`, and one over the root mean square of each."""
    from . import triton

    return triton.gather_normed_rows(states, rows, weight, eps, offset, cast_before_weight, dtype)


@_gather_op.register_fake
def _(states, rows, weight, eps, offset, cast_before_weight, dtype):
    kept = states.new_empty(*rows.shape, states.shape[-1])
    return kept, torch.empty_like(kept, dtype=dtype), states.new_empty(rows.numel(), dtype=compute_dtype(states))


@custom_op("tokenseek::write_normed_gradients_", mutates_args=("grad",))
def _write_op(
    grad: Tensor,
    grad_kept: Tensor,
    grad_normed: Tensor,
    kept: Tensor,
    rows: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    offset: float,
    needs_weight: bool,
) -> Tensor:
    """Writes the gradient of the rows over those of `grad`; gives that of the weight, empty if nobody asks for it."""
    from . import triton

    return triton.write_normed_gradients_(grad, grad_kept, grad_normed, kept, rows, weight, rstd, offset, needs_weight)


@_write_op.register_fake
def _(grad, grad_kept, grad_normed, kept, rows, weight, rstd, offset, needs_weight):
    return rstd.new_empty(kept.shape[-1] if needs_weight else 0)


class _SplitNormedRows(SplitsRows):
    """
    Saves the rows, `width * itemsize + 4` bytes each, and their indices.

    Its backward writes the gradient of the rows, through the norm and past it, over what [`join_rows`] left there.
    """

    @staticmethod
    def forward(ctx, states: Tensor, rows: Tensor, weight: Tensor | None, options: _Options):
        eps, offset, cast_before_weight, impl = options
        rule = eps, offset, cast_before_weight, output_dtype(states, weight, cast_before_weight)
        gather = _gather_op if impl == "triton" else eager.gather_normed_rows
        kept, normed, rstd = gather(states, rows, weight, *rule)
        ctx.save_for_backward(rows, kept, weight, rstd)
        ctx.options = options
        return states.detach(), kept, normed

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_rest: Tensor, grad_kept: Tensor, grad_normed: Tensor):
        rows, kept, weight, rstd = ctx.saved_tensors
        write = _write_op if ctx.options.impl == "triton" else eager.write_normed_gradients_
        needs_weight = ctx.needs_input_grad[2]
        grad = dense_copy(grad_rest)
        # in an autocast block too, what looks like a matrix product here is a float32 sum
        with torch.autocast(grad.device.type, enabled=False):
            tensors = grad, grad_kept, grad_normed, kept, rows, weight, rstd
            grad_weight = write(*tensors, ctx.options.offset, needs_weight)
        return grad, None, grad_weight if needs_weight else None, None


def split_normed_rows(
    states: Tensor,
    rows: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    offset: float = 0.0,
    cast_before_weight: bool = True,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """
    [`split_rows`] and the RMS norm that a layer's projections see them through, in one pass over the rows.

    For `rest, kept, normed = split_normed_rows(states, rows, weight, eps)` as for `rest, kept = split_rows(states,
    rows)` and `normed = rms_norm(kept, weight, eps)`, gradients included; Triton adds those of `kept` to those through
    the norm before it rounds. Differentiable once. Saved: the rows, 4 bytes each, and `rows`.

    Args:
        states (`torch.Tensor` of shape `(batch, n, width)`):
            The residual stream, of any floating dtype. Normalised in float32 (float64 if that is its dtype).
        rows (`torch.LongTensor` of shape `(batch, k)`):
            Index of each row, ascending; -1 fills up at the end.
        weight (`torch.Tensor` of shape `(width,)`, *optional*), eps, offset, cast_before_weight:
            As in [`rms_norm`].
        impl (`str`, *optional*, defaults to `"auto"`):
            `"auto"`, `"triton"` (up to 8192 features), `"torch"` or `"reference"`.

    Returns:
        `(rest, kept, normed)`: the first two as [`split_rows`] gives them, for [`join_rows`]; `normed`, `(batch, k,
        width)` in the dtype that [`rms_norm`] gives, has zeros in empty slots.

    Raises:
        ValueError: `states`, `rows` or `weight` have another dtype or shape, or `impl` is unknown or cannot run here.
    """
    check_rows("states", states, rows)
    check_inputs(states, weight=weight)
    impl = resolve_up_to(WIDEST, impl, states, states.shape[-1])
    if impl == "reference":
        rest, kept = split_rows_reference(states, rows)
        return rest, kept, rms_norm(kept, weight, eps, offset, cast_before_weight)
    return _SplitNormedRows.apply(states, rows, weight, _Options(eps, offset, cast_before_weight, impl))
