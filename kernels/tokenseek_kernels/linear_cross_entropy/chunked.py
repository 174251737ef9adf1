"""Plain torch in which `[N, V]` logits never exist: one chunk at a time, worked on in place.

Forward and statistics cut the rows: a row's softmax is complete within its chunk. Backward knows the softmax's
normaliser already, so it cuts the vocabulary: each row of the weight gradient is then finished by one matrix product,
and needs neither an accumulator of the weight's size nor a second visit.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_BYTES = 64 * 2**20


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """float32, or float64 for float64 inputs: the type of the softmax, the loss and the statistics."""
    return torch.promote_types(hidden.dtype, torch.float32)


def forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    chunk_rows: int | None,
) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp per row, each `[N]`. Alive at once: one chunk of logits and its low-precision original."""
    loss = hidden.new_empty(hidden.shape[0], dtype=compute_dtype(hidden))
    log_sum_exp = torch.empty_like(loss)
    weight = weight.to(hidden.dtype)
    ignored = targets == ignore_index
    columns = targets.masked_fill(ignored, 0)[:, None]
    for rows in _slices(hidden.shape[0], chunk_rows or _default_rows(hidden, weight)):
        logits = _logits(hidden[rows], weight, bias, logit_scale, softcap)
        target_logits = logits.gather(1, columns[rows]).squeeze(1)
        top, total = _exponentiate(logits)
        log_sum_exp[rows] = top + total.log()
        loss[rows] = log_sum_exp[rows] - target_logits
        # else it would live until the next chunk exists; likewise below
        del logits
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
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias, those that `needs` asks for.

    A row with an ignored target or a zero upstream gradient must contribute exactly nothing, whatever it holds. Its
    coefficient 0 is not enough, as 0 * NaN is NaN, so its hidden state is replaced by 0 and its normaliser by
    infinity: its probabilities are then exactly 0.
    """
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    dropped = (targets == ignore_index) | (grad_loss == 0)
    coefficient = (grad_loss * logit_scale).masked_fill(dropped, 0.0)[:, None]
    normaliser = log_sum_exp.masked_fill(dropped, torch.inf)[:, None]
    hidden = hidden.masked_fill(dropped[:, None], 0.0)

    grad_hidden = hidden.new_zeros(hidden.shape, dtype=compute_dtype(hidden)) if needs[0] else None
    grad_weight = weight.new_empty(weight.shape) if needs[1] else None
    grad_bias = bias.new_empty(bias.shape) if needs[2] else None
    chunk_size = (chunk_rows or _default_rows(hidden, weight)) * vocabulary
    for columns in _slices(vocabulary, max(1, chunk_size // max(1, rows))):
        part = weight[columns].to(hidden.dtype)
        grad_logits = _logits(hidden, part, None if bias is None else bias[columns], logit_scale, softcap)
        slope = _softcap_slope(grad_logits, softcap)
        _subtract_one_hot(grad_logits.sub_(normaliser).exp_(), targets - columns.start).mul_(coefficient)
        if slope is not None:
            grad_logits.mul_(slope)
        if needs[2]:
            grad_bias[columns] = grad_logits.sum(0)
        grad_logits = grad_logits.to(hidden.dtype)
        if needs[0]:
            _add_product(grad_hidden, grad_logits, part)
        if needs[1]:
            _write_product(grad_weight[columns], grad_logits.T, hidden)
        del grad_logits, slope
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, entropy and gradient norm, each `[N]`. Alive at once: two chunks of logits (three with a softcap)."""
    loss = hidden.new_empty(hidden.shape[0], dtype=compute_dtype(hidden))
    entropy, norm = torch.empty_like(loss), torch.empty_like(loss)
    weight = weight.to(hidden.dtype)
    ignored = targets == ignore_index
    columns = targets.masked_fill(ignored, 0)
    for rows in _slices(hidden.shape[0], chunk_rows or _default_rows(hidden, weight)):
        logits = _logits(hidden[rows], weight, bias, logit_scale, softcap)
        target_logits = logits.gather(1, columns[rows, None]).squeeze(1)
        slope = _softcap_slope(logits, softcap)
        top, total = _exponentiate(logits)
        loss[rows] = top + total.log() - target_logits
        entropy[rows] = torch.special.entr(logits.div_(total[:, None])).sum(1)
        _subtract_one_hot(logits, columns[rows])
        if slope is not None:
            logits.mul_(slope)
        grad_hidden = logits.to(hidden.dtype) @ weight
        norm[rows] = abs(logit_scale) * torch.linalg.vector_norm(grad_hidden, dim=1, dtype=norm.dtype)
        del logits, slope
    return loss.masked_fill_(ignored, 0.0), entropy, norm.masked_fill_(ignored, 0.0)


def _default_rows(hidden: Tensor, weight: Tensor) -> int:
    return max(1, CHUNK_BYTES // (weight.shape[0] * compute_dtype(hidden).itemsize))


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, logit_scale: float, softcap: float | None) -> Tensor:
    """Fresh logits: the product in the dtype of its factors, everything after it in the compute dtype."""
    logits = (hidden @ weight.T).to(compute_dtype(hidden))
    if bias is not None:
        logits.add_(bias)
    if logit_scale != 1.0:
        logits.mul_(logit_scale)
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def _softcap_slope(logits: Tensor, softcap: float | None) -> Tensor | None:
    """d (softcap * tanh(z / softcap)) / dz, from the capped logits."""
    return None if softcap is None else (logits / softcap).square_().neg_().add_(1.0)


def _exponentiate(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Replaces logits by exp(logits - top) in place; returns top and the row sums."""
    top = logits.amax(1)
    return top, logits.sub_(top[:, None]).exp_().sum(1)


def _subtract_one_hot(probabilities: Tensor, columns: Tensor) -> Tensor:
    """In place; rows whose column lies outside of this chunk stay as they are."""
    last = probabilities.shape[1] - 1
    inside = (columns >= 0) & (columns <= last)
    minus_one = inside.to(probabilities.dtype).neg_()
    return probabilities.scatter_add_(1, columns.clamp(0, last)[:, None], minus_one[:, None])


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, without a temporary where the dtypes allow it."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


def _write_product(place: Tensor, left: Tensor, right: Tensor) -> None:
    """place = left @ right, without a temporary where the dtypes allow it."""
    if place.dtype == left.dtype:
        torch.mm(left, right, out=place)
    else:
        place.copy_(left @ right)
