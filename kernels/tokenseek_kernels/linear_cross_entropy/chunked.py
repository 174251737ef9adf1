"""`[N, V]` logits never exist: one chunk at a time. Here are the cuts and the products that follow a chunk.

Forward and statistics cut the rows: a row's softmax is complete within its chunk. Backward knows the softmax's
normaliser already, so it cuts the vocabulary: each row of the weight gradient is then finished by one matrix product,
and needs neither an accumulator of the weight's size nor a second visit.

What is made of a chunk is in `logits.py` (torch) and `triton.py`: the same three functions in both.
"""

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from tokenseek_kernels.linear_cross_entropy import logits
from tokenseek_kernels.linear_cross_entropy.logits import compute_dtype

# So many columns, or a multiple: the rows of a chunk then begin where vector loads and matrix units like it.
COLUMN_STEP = 64


def forward(
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
    """Loss and log-sum-exp per row, each `[N]`."""
    on_chunk = _implementation(impl)
    loss = hidden.new_empty(hidden.shape[0], dtype=compute_dtype(hidden))
    log_sum_exp = torch.empty_like(loss)
    weight = weight.to(hidden.dtype)
    ignored = targets == ignore_index
    classes = targets.masked_fill(ignored, 0)
    for rows in _row_slices(hidden, weight, chunk_rows, on_chunk):
        chunk = hidden[rows], weight, bias, classes[rows]
        loss[rows], log_sum_exp[rows] = on_chunk.cross_entropy(*chunk, logit_scale, softcap)
    return loss.masked_fill_(ignored, 0.0), log_sum_exp


def backward(
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
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias, those that `needs` asks for.

    A row with an ignored target or a zero upstream gradient must contribute exactly nothing, whatever it holds. Its
    coefficient 0 is not enough, as 0 * NaN is NaN, so its hidden state is replaced by 0 and its normaliser by
    infinity: its probabilities are then exactly 0.
    """
    on_chunk = _implementation(impl)
    dropped = (targets == ignore_index) | (grad_loss == 0)
    coefficient = (grad_loss * logit_scale).masked_fill(dropped, 0.0)
    normaliser = log_sum_exp.masked_fill(dropped, torch.inf)
    hidden = hidden.masked_fill(dropped[:, None], 0.0)

    grad_hidden = hidden.new_zeros(hidden.shape, dtype=compute_dtype(hidden)) if needs[0] else None
    grad_weight = weight.new_empty(weight.shape) if needs[1] else None
    grad_bias = bias.new_empty(bias.shape) if needs[2] else None
    for columns in _column_slices(hidden, weight, chunk_rows, on_chunk):
        part = weight[columns].to(hidden.dtype)
        chunk = hidden, part, None if bias is None else bias[columns], targets, columns.start
        grad_logits = on_chunk.grad_logits(*chunk, normaliser, coefficient, logit_scale, softcap)
        if needs[0]:
            _add_product(grad_hidden, grad_logits, part)
        if needs[1]:
            _write_product(grad_weight[columns], grad_logits.T, hidden)
        if needs[2]:
            grad_bias[columns] = grad_logits.sum(0, dtype=compute_dtype(hidden))
        # else it would live until the next chunk exists
        del grad_logits
    return grad_hidden.to(hidden.dtype) if needs[0] else None, grad_weight, grad_bias


def head_statistics(
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
    """Loss, entropy and gradient norm, each `[N]`."""
    on_chunk = _implementation(impl)
    loss = hidden.new_empty(hidden.shape[0], dtype=compute_dtype(hidden))
    entropy, norm = torch.empty_like(loss), torch.empty_like(loss)
    weight = weight.to(hidden.dtype)
    ignored = targets == ignore_index
    classes = targets.masked_fill(ignored, 0)
    for rows in _row_slices(hidden, weight, chunk_rows, on_chunk):
        chunk = hidden[rows], weight, bias, classes[rows]
        loss[rows], entropy[rows], grad_logits = on_chunk.statistics(*chunk, logit_scale, softcap)
        norm[rows] = torch.linalg.vector_norm(grad_logits @ weight, dim=1, dtype=norm.dtype)
        # else it would live until the next chunk exists
        del grad_logits
    return loss.masked_fill_(ignored, 0.0), entropy, norm.mul_(abs(logit_scale)).masked_fill_(ignored, 0.0)


def _implementation(impl: str) -> ModuleType:
    if impl == "torch":
        return logits
    # not before it is asked for: a machine without a GPU may have no Triton
    from tokenseek_kernels.linear_cross_entropy import triton

    return triton


def _chunk_elements(hidden: Tensor, weight: Tensor, chunk_rows: int | None, on_chunk: ModuleType) -> int:
    return on_chunk.chunk_elements(hidden) if chunk_rows is None else chunk_rows * weight.shape[0]


def _row_slices(hidden: Tensor, weight: Tensor, chunk_rows: int | None, on_chunk: ModuleType) -> Iterator[slice]:
    step = _chunk_elements(hidden, weight, chunk_rows, on_chunk) // weight.shape[0]
    return _slices(hidden.shape[0], max(1, step))


def _column_slices(hidden: Tensor, weight: Tensor, chunk_rows: int | None, on_chunk: ModuleType) -> Iterator[slice]:
    step = _chunk_elements(hidden, weight, chunk_rows, on_chunk) // max(1, hidden.shape[0])
    if step > COLUMN_STEP:
        step -= step % COLUMN_STEP
    return _slices(weight.shape[0], max(1, step))


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right. Where the dtypes differ only NVIDIA's libraries can add without rounding the product."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.device.type == "cuda" and torch.version.hip is None:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.add_(left @ right)


def _write_product(place: Tensor, left: Tensor, right: Tensor) -> None:
    """place = left @ right, without a temporary where the dtypes allow it."""
    if place.dtype == left.dtype:
        torch.mm(left, right, out=place)
    else:
        place.copy_(left @ right)
