"""The formulas of README.md, written down densely. Nothing here is meant to be fast or small."""

import torch
import torch.nn.functional as F
from torch import Tensor


def dense_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, logit_scale: float, softcap: float | None
) -> Tensor:
    """Logits `[N, V]` in float32 (float64 for float64 inputs)."""
    product = F.linear(hidden, weight, bias)
    logits = logit_scale * product.to(torch.promote_types(product.dtype, torch.float32))
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
) -> Tensor:
    """Loss per row `[N]`; autograd differentiates it."""
    logits = dense_logits(hidden, weight, bias, logit_scale, softcap)
    ignored = targets == ignore_index
    target_logits = logits.gather(1, targets.masked_fill(ignored, 0)[:, None]).squeeze(1)
    return (logits.logsumexp(1) - target_logits).masked_fill(ignored, 0.0)


def head_statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, entropy and the norm of the loss's gradient at the hidden state, each `[N]`."""
    loss = linear_cross_entropy(hidden, weight, targets, bias, logit_scale, softcap, ignore_index)
    logits = dense_logits(hidden, weight, bias, logit_scale, softcap)
    probabilities = logits.softmax(1)
    ignored = targets == ignore_index
    grad_logits = probabilities - F.one_hot(targets.masked_fill(ignored, 0), weight.shape[0])
    if softcap is not None:
        grad_logits = grad_logits * (1 - (logits / softcap) ** 2)
    grad_hidden = logit_scale * grad_logits @ weight.to(logits.dtype)
    return loss, torch.special.entr(probabilities).sum(1), grad_hidden.norm(dim=1).masked_fill(ignored, 0.0)
