"""The door and autograd. Matrix products only, so that torch is the fast implementation everywhere."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokenseek_kernels.custom_op import custom_op
from tokenseek_kernels.dispatch import resolve_impl
from tokenseek_kernels.lean_lora import reference
from tokenseek_kernels.precision import linear_dtype


class _Options(NamedTuple):
    scaling: float
    dropout: float
    dtype: torch.dtype


@custom_op("tokenseek::dropped_elements")
def _dropped_elements(shape: Sequence[int], device: torch.device, dropout: float, seed: Tensor) -> Tensor:
    # an operator because of this line: a fake seed has no value
    return reference.dropped_elements(shape, device, dropout, int(seed))


@_dropped_elements.register_fake
def _(shape, device, dropout, seed):
    return torch.empty(shape, dtype=torch.bool, device=device)


class LoraDeltaFunction(torch.autograd.Function):
    """Saves x as it came, as other layers that read it do, and the few numbers a row that A makes of it.

    Kept for backward beside A and B, which are parameters: `width * x.itemsize + rank * itemsize` bytes a row, and
    with dropout 8 bytes in all, the seed of its mask. No copy of x that is cast or dropped, and no mask.
    """

    @staticmethod
    def forward(ctx, x: Tensor, a: Tensor, b: Tensor, seed: Tensor | None, options: _Options) -> Tensor:
        ctx.options, ctx.shape = options, x.shape
        states = x.to(options.dtype)
        if seed is not None:
            states = states.masked_fill(_dropped_elements(x.shape, x.device, options.dropout, seed), 0)
        inner = F.linear(states, a.to(options.dtype)).div_(reference.kept_share(options.dropout))
        needs_x, needs_a, needs_b, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_a else None, a if needs_x else None, b, inner if needs_b else None, seed)
        return F.linear(inner, b.to(options.dtype)).mul_(options.scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, a, b, inner, seed = ctx.saved_tensors
        needs_x, needs_a, needs_b, *_ = ctx.needs_input_grad
        scaling, dropout, dtype = ctx.options
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_a = grad_b = None
        # factors go to tensors as narrow as the rank, not to the gradient
        with torch.autocast(grad.device.type, enabled=False):
            if needs_b:
                grad_b = rows.T @ (inner.reshape(-1, inner.shape[-1]) * scaling)
            if needs_x or needs_a:
                grad_inner = (rows @ b.to(dtype)).mul_(scaling / reference.kept_share(dropout))
                dropped = None if seed is None else _dropped_elements(ctx.shape, grad.device, dropout, seed)
            if needs_a:
                states = x.to(dtype) if seed is None else x.to(dtype).masked_fill(dropped, 0)
                grad_a = grad_inner.T @ states.reshape(-1, ctx.shape[-1])
            if needs_x:
                grad_x = (grad_inner @ a.to(dtype)).view(ctx.shape)
                grad_x = grad_x if seed is None else grad_x.masked_fill_(dropped, 0)
        return grad_x, grad_a, grad_b, None, None


class SeededDropoutFunction(torch.autograd.Function):
    """Saves 8 bytes: the seed, from which backward draws the mask again."""

    @staticmethod
    def forward(ctx, x: Tensor, seed: Tensor, dropout: float) -> Tensor:
        ctx.save_for_backward(seed)
        ctx.dropout = dropout
        return _dropped(x, seed, dropout)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return _dropped(grad, *ctx.saved_tensors, ctx.dropout), None, None


def seeded_dropout(x: Tensor, dropout: float, *, seed: int | None = None) -> Tensor:
    """Dropout that keeps the seed of its mask in place of the mask.

    Args:
        x (`torch.Tensor`):
            Any floating dtype.
        dropout (`float`):
            Share of the elements that are zeroed, in `(0, 1)`, rounded to a multiple of 2^-16.
        seed (`int`, *optional*):
            Of the mask. By default drawn from torch's generator, which checkpointing sets back.

    Returns:
        `torch.Tensor`: same shape and dtype.

    Raises:
        ValueError: `dropout` is not in `(0, 1)`.
    """
    if not 0 < reference.dropped_levels(dropout) < reference.LEVELS:
        raise ValueError(f"`dropout` must be in (0, 1), got {dropout}.")
    return SeededDropoutFunction.apply(x, _drawn(seed), dropout)


def lora_delta(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scaling: float,
    *,
    dropout: float = 0.0,
    seed: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """What a LoRA adapter adds to its base layer: `scaling * B A drop(x)`.

    Differentiable once in `x`, `a` and `b`. Saved a row: `x` in its own dtype, and `rank` numbers.

    Args:
        x (`torch.Tensor` of shape `(..., width)`):
            Any floating dtype; cast to the adapter's, as PEFT does, for the duration of a product.
        a (`torch.Tensor` of shape `(rank, width)`):
            The adapter works in its dtype, under autocast in the autocast dtype.
        b (`torch.Tensor` of shape `(out, rank)`):
            Likewise.
        scaling (`float`):
            Factor on the result.
        dropout (`float`, *optional*, defaults to 0.0):
            Share of the elements of `x` that are zeroed, in `[0, 1)`, rounded to a multiple of 2^-16.
        seed (`int`, *optional*):
            Of dropout's mask. By default drawn from torch's generator, which checkpointing sets back.
        impl (`str`, *optional*, defaults to `"auto"`):
            `"auto"`, `"torch"` or `"reference"`.

    Returns:
        `torch.Tensor`: `(..., out)`, in the dtype in which the adapter works.

    Raises:
        ValueError: `dropout` is not in `[0, 1)`, shapes do not fit together, or `impl` is unknown.
    """
    if not 0 <= reference.dropped_levels(dropout) < reference.LEVELS:
        raise ValueError(f"`dropout` must be in [0, 1), got {dropout}.")
    if a.dim() != 2 or b.dim() != 2 or x.shape[-1:] != a.shape[1:] or b.shape[1] != a.shape[0]:
        raise ValueError(
            f"`x` [..., width], `a` [rank, width] and `b` [out, rank] do not fit together: got {list(x.shape)}, "
            f"{list(a.shape)} and {list(b.shape)}."
        )
    dtype = linear_dtype(a)
    if dropout:
        seed = _drawn(seed)
    if resolve_impl(impl, x, ("torch", "reference")) == "reference":
        return reference.lora_delta(x, a, b, scaling, dropout, int(seed) if dropout else None, dtype)
    return LoraDeltaFunction.apply(x, a, b, seed if dropout else None, _Options(scaling, dropout, dtype))


def _drawn(seed: int | None) -> Tensor:
    return torch.randint(2**62, ()) if seed is None else torch.tensor(seed)


def _dropped(x: Tensor, seed: Tensor, dropout: float) -> Tensor:
    dropped = _dropped_elements(x.shape, x.device, dropout, seed)
    return x.masked_fill(dropped, 0).div_(reference.kept_share(dropout))
