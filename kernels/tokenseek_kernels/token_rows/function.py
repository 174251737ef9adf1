"""Selected rows out of a residual stream and back into it: the doors, their autograd functions and the custom ops."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..custom_op import custom_op
from ..dispatch import resolve_impl
from . import eager
from .reference import join_rows_reference, split_rows_reference


def _module_of(impl: str):
    """The module with the two functions of an implementation; Triton is imported when it is asked for."""
    if impl == "triton":
        from . import triton

        return triton
    return eager


@custom_op("tokenseek::gather_rows")
def _gather_op(states: Tensor, rows: Tensor, impl: str) -> Tensor:
    return _module_of(impl).gather_rows(states, rows)


@_gather_op.register_fake
def _(states, rows, impl):
    return states.new_empty(*rows.shape, states.shape[-1])


@custom_op("tokenseek::write_rows_", mutates_args=("states",))
def _write_op(states: Tensor, fresh: Tensor, rows: Tensor, impl: str) -> None:
    _module_of(impl).write_rows_(states, fresh, rows)


@_write_op.register_fake
def _(states, fresh, rows, impl):
    return None


class SplitsRows(torch.autograd.Function):
    """Whose backward completes the gradient that [`_JoinRows`] hands on."""


class _SplitRows(SplitsRows):
    """Saves `rows`. Its backward writes the gradient of `kept` over what [`_JoinRows`] left in the rows of `rest`."""

    @staticmethod
    def forward(ctx, states: Tensor, rows: Tensor, impl: str) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rows)
        ctx.impl = impl
        # the input itself would come out as one of several views, which autograd lets nobody write into
        return states.detach(), _gather_op(states, rows, impl)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_rest: Tensor, grad_kept: Tensor):
        (rows,) = ctx.saved_tensors
        grad = dense_copy(grad_rest)
        _write_op(grad, grad_kept, rows, ctx.impl)
        return grad, None, None


class _JoinRows(torch.autograd.Function):
    """Saves `rows`. Its backward hands the gradient on to `rest` as it is: [`_SplitRows`] replaces it in the rows."""

    @staticmethod
    def forward(ctx, rest: Tensor, fresh: Tensor, rows: Tensor, inplace: bool, impl: str) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.impl = impl
        if inplace:
            ctx.mark_dirty(rest)
        joined = rest if inplace else dense_copy(rest)
        _write_op(joined, fresh, rows, impl)
        return joined

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (rows,) = ctx.saved_tensors
        grad_fresh = _gather_op(grad, rows, ctx.impl) if ctx.needs_input_grad[1] else None
        return grad, grad_fresh, None, None, None


def split_rows(states: Tensor, rows: Tensor, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """
    Takes the rows that a layer works on out of a residual stream; [`join_rows`] puts what becomes of them back.

    For `y = join_rows(rest, f(kept), rows)` the gradient of `states` is that of `y`, bit for bit, at all other rows,
    and the gradient through `f` at these. Differentiable once. Saved: `rows`, by the pair of them, 8 bytes a slot.

    Args:
        states (`torch.Tensor` of shape `(batch, n, width)`):
            The residual stream, of any floating dtype.
        rows (`torch.LongTensor` of shape `(batch, k)`):
            Index of each row, ascending; -1 fills up at the end.
        impl (`str`, *optional*, defaults to `"auto"`):
            `"auto"` (Triton on a GPU, torch on the CPU), `"triton"`, `"torch"` or `"reference"`.

    Returns:
        `(rest, kept)`: `rest` is the memory of `states`, not a copy, to be handed to [`join_rows`] **and to nobody
        else**: only the two backward passes together give its gradient. `kept`, `(batch, k, width)`, has the rows,
        and zeros in empty slots.

    Raises:
        ValueError: `states` or `rows` have another dtype or shape, or `impl` is unknown or cannot run here.
    """
    check_rows("states", states, rows)
    impl = resolve_impl(impl, states)
    if impl == "reference":
        return split_rows_reference(states, rows)
    return _SplitRows.apply(states, rows, impl)


def join_rows(rest: Tensor, fresh: Tensor, rows: Tensor, inplace: bool = False, impl: str = "auto") -> Tensor:
    """
    Puts rows back into the residual stream that [`split_rows`] took them out of.

    Args:
        rest (`torch.Tensor` of shape `(batch, n, width)`):
            From [`split_rows`], as it is.
        fresh (`torch.Tensor` of shape `(batch, k, width)`):
            What became of the rows, in the dtype of `rest`; empty slots are not read.
        rows (`torch.LongTensor` of shape `(batch, k)`):
            The rows that were split off.
        inplace (`bool`, *optional*, defaults to `False`):
            Whether to write into the memory of `rest`, which spares a copy of n rows. That is the memory of the
            `states` that were split, so it is allowed where nobody reads those any more. Autograd raises in its
            backward pass where an operation saved them; **nothing raises** where a checkpoint is to recompute from
            them, or where they are an output of the model.
        impl (`str`, *optional*, defaults to `"auto"`):
            As in [`split_rows`]; `"reference"` takes the `rest` of its own kind, and leaves it as it is.

    Returns:
        `torch.Tensor` of shape `(batch, n, width)`: `rest` with `fresh` in its rows, a new tensor or `rest` itself.

    Raises:
        ValueError: `rest` has a gradient that does not go to [`split_rows`], a tensor has another dtype or shape, or
            `impl` is unknown or cannot run here.
    """
    check_rows("rest", rest, rows)
    if fresh.dtype != rest.dtype or fresh.shape != (*rows.shape, rest.shape[-1]):
        raise ValueError(
            f"`fresh` must be {rest.dtype} of shape {(*rows.shape, rest.shape[-1])}, a row for each of `rows`, got "
            f"{fresh.dtype} of shape {tuple(fresh.shape)}. Cast it to the dtype of the residual stream."
        )
    impl = resolve_impl(impl, rest)
    if impl == "reference":
        return join_rows_reference(rest, fresh, rows)
    if rest.requires_grad and not issubclass(getattr(rest.grad_fn, "_forward_cls", object), SplitsRows):
        raise ValueError(
            f"`rest` must come from split_rows, which completes its gradient, got one from {rest.grad_fn}. Split the "
            "residual stream first, with the same implementation, and hand `rest` on as it is."
        )
    return _JoinRows.apply(rest, fresh, rows, inplace, impl)


def check_rows(name: str, states: Tensor, rows: Tensor) -> None:
    """Refuses a stream, by its name, or rows of another dtype or shape."""
    if states.dim() != 3 or not states.is_floating_point():
        raise ValueError(
            f"`{name}` must be floating point of shape (batch, n, width), got {states.dtype} of shape "
            f"{tuple(states.shape)}."
        )
    if rows.dtype != torch.long or rows.dim() != 2 or len(rows) != len(states):
        raise ValueError(
            f"`rows` must be torch.int64 of shape ({len(states)}, k), indices into `{name}` and -1 in empty slots, "
            f"got {rows.dtype} of shape {tuple(rows.shape)}."
        )


def dense_copy(states: Tensor) -> Tensor:
    """A new tensor without gaps, whatever the strides."""
    return states.clone(memory_format=torch.contiguous_format)
