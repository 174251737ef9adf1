"""What is made of one chunk of logits, in plain torch and in place; `triton.py` does the same in one pass each."""

import torch
from torch import Tensor

CHUNK_BYTES = 64 * 2**20


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """float32, or float64 for float64 inputs: the type of the softmax, the loss and the statistics."""
    return torch.promote_types(hidden.dtype, torch.float32)


def chunk_elements(hidden: Tensor) -> int:
    """Logits held at once by default: 64 MiB in the compute dtype."""
    return CHUNK_BYTES // compute_dtype(hidden).itemsize


def cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, classes: Tensor, logit_scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp of each row. Alive at once: the logits and their low-precision original."""
    logits = _logits(hidden, weight, bias, logit_scale, softcap)
    target_logits = logits.gather(1, classes[:, None]).squeeze(1)
    top, total = _exponentiate(logits)
    log_sum_exp = top + total.log()
    return log_sum_exp - target_logits, log_sum_exp


def grad_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    first_column: int,
    log_sum_exp: Tensor,
    coefficient: Tensor,
    logit_scale: float,
    softcap: float | None,
) -> Tensor:
    """
    `coefficient * dloss/dz` in the dtype of `hidden`, for the columns from `first_column` on, to which `weight` and
    `bias` belong.
    """
    logits = _logits(hidden, weight, bias, logit_scale, softcap)
    slope = _softcap_slope(logits, softcap)
    probabilities = logits.sub_(log_sum_exp[:, None]).exp_()
    gradient = _subtract_one_hot(probabilities, targets - first_column).mul_(coefficient[:, None])
    if slope is not None:
        gradient.mul_(slope)
    return gradient.to(hidden.dtype)


def statistics(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, classes: Tensor, logit_scale: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and entropy of each row, and dloss/dz in the dtype of `hidden`. A second chunk lives for the entropy."""
    logits = _logits(hidden, weight, bias, logit_scale, softcap)
    target_logits = logits.gather(1, classes[:, None]).squeeze(1)
    slope = _softcap_slope(logits, softcap)
    top, total = _exponentiate(logits)
    loss = top + total.log() - target_logits
    entropy = torch.special.entr(logits.div_(total[:, None])).sum(1)
    gradient = _subtract_one_hot(logits, classes)
    if slope is not None:
        gradient.mul_(slope)
    return loss, entropy, gradient.to(hidden.dtype)


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
