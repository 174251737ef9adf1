"""The one door: argument checks, autocast, autograd and the custom operators."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokenseek_kernels.custom_op import custom_op
from tokenseek_kernels.dispatch import resolve_impl
from tokenseek_kernels.linear_cross_entropy import chunked, reference
from tokenseek_kernels.linear_cross_entropy.logits import compute_dtype


class HeadStatistics(NamedTuple):
    """What a language model's head says about each row, without gradients.

    Attributes:
        loss (`torch.Tensor`):
            Cross entropy in nats, float32 `[N]`, 0 at ignored rows.
        entropy (`torch.Tensor`):
            Entropy of the prediction in nats, float32 `[N]`, real at ignored rows too.
        gradient_norm (`torch.Tensor`):
            Euclidean norm of the row's loss gradient at its hidden state, float32 `[N]`, 0 at ignored rows.
    """

    loss: Tensor
    entropy: Tensor
    gradient_norm: Tensor


class _Options(NamedTuple):
    """Everything but tensors, in the order in which the operators take it."""

    logit_scale: float
    softcap: float | None
    ignore_index: int
    chunk_rows: int | None
    impl: str


@custom_op("tokenseek::linear_cross_entropy_forward")
def _forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    chunk_rows: int | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    return chunked.forward(hidden, weight, targets, bias, logit_scale, softcap, ignore_index, chunk_rows, impl)


@_forward.register_fake
def _(hidden, *others):
    loss = hidden.new_empty(hidden.shape[0], dtype=compute_dtype(hidden))
    return loss, torch.empty_like(loss)


@custom_op("tokenseek::linear_cross_entropy_backward")
def _backward(
    grad_loss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    log_sum_exp: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    chunk_rows: int | None,
    impl: str,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    needs = (needs_hidden, needs_weight, needs_bias)
    options = (logit_scale, softcap, ignore_index, chunk_rows, impl)
    gradients = chunked.backward(grad_loss, hidden, weight, targets, log_sum_exp, bias, *options, needs)
    return tuple(hidden.new_empty(0) if gradient is None else gradient for gradient in gradients)


@_backward.register_fake
def _(grad_loss, hidden, weight, targets, log_sum_exp, bias, *options_and_needs):
    inputs = zip((hidden, weight, bias), options_and_needs[-3:], strict=True)
    return tuple(tensor.new_empty(tensor.shape) if needed else hidden.new_empty(0) for tensor, needed in inputs)


@custom_op("tokenseek::head_statistics")
def _statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    chunk_rows: int | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return chunked.head_statistics(hidden, weight, targets, bias, logit_scale, softcap, ignore_index, chunk_rows, impl)


@_statistics.register_fake
def _(hidden, *others):
    return tuple(hidden.new_empty(hidden.shape[0], dtype=compute_dtype(hidden)) for _ in range(3))


class LinearCrossEntropyFunction(torch.autograd.Function):
    """Saves its inputs and the log-sum-exp, because a chunk of logits is cheaper to compute again than to keep.

    Kept for backward beside weight and bias, which are parameters: `N * (D * itemsize + 8 + 4)` bytes (hidden, int64
    targets, float32 log-sum-exp). The hidden state is usually kept by the final norm anyhow.
    """

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: _Options
    ) -> Tensor:
        loss, log_sum_exp = _forward(hidden, weight, targets, bias, *options)
        ctx.save_for_backward(hidden, weight, targets, log_sum_exp, bias)
        ctx.options = options
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor):
        needs = ctx.needs_input_grad[:3]
        gradients = _backward(grad_loss, *ctx.saved_tensors, *ctx.options, *needs)
        wanted = (gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True))
        return *wanted, None, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    chunk_rows: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """Cross entropy of a linear head per row, without ever holding the `[N, V]` logits.

    Differentiable once in `hidden`, `weight` and `bias` for any gradient per row. A row that is ignored, or whose
    upstream gradient is 0, adds exactly nothing to any gradient, even where its hidden state is NaN. Under autocast
    the matrix products run in the autocast dtype, as those of `torch.nn.Linear` would.

    Args:
        hidden (`torch.Tensor` of shape `(N, D)`):
            Hidden states, any floating dtype.
        weight (`torch.Tensor`):
            The head's weight `[V, D]`, same dtype (any under autocast).
        targets (`torch.Tensor`):
            Class per row, int64 `[N]`, in `[0, V)` or `ignore_index`.
        bias (`torch.Tensor`, *optional*):
            The head's bias `[V]`.
        logit_scale (`float`, *optional*, defaults to 1.0):
            Factor on the logits (Cohere's; Granite's is a divisor).
        softcap (`float`, *optional*):
            Logits become `softcap * tanh(logits / softcap)` after scaling (Gemma).
        ignore_index (`int`, *optional*, defaults to -100):
            Target of the rows that have no loss.
        chunk_rows (`int`, *optional*):
            Rows of logits held at once. By default as many as fit in 64 MiB of float32, or with Triton in 128 MiB of
            the dtype of `hidden`. Backward holds as many elements.
        impl (`str`, *optional*, defaults to `"auto"`):
            `"triton"` (default on GPUs; `logit_scale` and `softcap` are compiled in), `"torch"` (default elsewhere) or
            `"reference"` (dense).

    Returns:
        `torch.Tensor`: Loss in nats, float32 `[N]` (float64 for float64 inputs), 0 at ignored rows.

    Raises:
        ValueError: On shapes or dtypes that do not fit together, `chunk_rows` below 1, `softcap` not above 0, or an
            `impl` that is unknown or cannot run on this device.
    """
    hidden = _to_autocast_dtype(hidden)
    _check(hidden, weight, targets, bias, softcap, chunk_rows)
    options = _Options(logit_scale, softcap, ignore_index, chunk_rows, resolve_impl(impl, hidden))
    if options.impl == "reference":
        return reference.linear_cross_entropy(hidden, weight, targets, bias, *options[:3])
    return LinearCrossEntropyFunction.apply(hidden, weight, bias, targets, options)


@torch.no_grad()
def head_statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    chunk_rows: int | None = None,
    impl: str = "auto",
) -> HeadStatistics:
    """Loss, entropy and gradient norm per row, without gradients, in one pass over the logits.

    Takes the arguments of [`linear_cross_entropy`] and raises the same errors.

    Returns:
        [`HeadStatistics`]: `loss`, `entropy` and `gradient_norm`, each float32 `[N]` (float64 for float64 inputs).
    """
    hidden = _to_autocast_dtype(hidden)
    _check(hidden, weight, targets, bias, softcap, chunk_rows)
    options = _Options(logit_scale, softcap, ignore_index, chunk_rows, resolve_impl(impl, hidden))
    if options.impl == "reference":
        return HeadStatistics(*reference.head_statistics(hidden, weight, targets, bias, *options[:3]))
    return HeadStatistics(*_statistics(hidden, weight, targets, bias, *options))


def _to_autocast_dtype(hidden: Tensor) -> Tensor:
    """Only hidden is cast here: the operators cast the weight themselves, and backward keeps no copy of it."""
    device = hidden.device.type
    if hidden.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return hidden
    return hidden.to(torch.get_autocast_dtype(device))


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    chunk_rows: int | None,
) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"`hidden` must be [N, D] and `weight` [V, D], got {list(hidden.shape)} and {list(weight.shape)}. "
            "Flatten batch and sequence first: `hidden.flatten(0, -2)`."
        )
    if targets.dtype != torch.int64 or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"`targets` must be torch.int64 of shape [{hidden.shape[0]}], one per row of `hidden`, got "
            f"{targets.dtype} of shape {list(targets.shape)}. Use `targets.flatten().long()`."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"`bias` must be [{weight.shape[0]}], one per row of `weight`, got {list(bias.shape)}.")
    if hidden.dtype != weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise ValueError(
            f"`hidden` is {hidden.dtype} and `weight` {weight.dtype}; they must have one dtype. Cast one of them, or "
            "use `torch.autocast`."
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"`softcap` must be above 0, got {softcap}. Use `None` for uncapped logits.")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"`chunk_rows` must be at least 1, got {chunk_rows}. Use `None` for the default.")
