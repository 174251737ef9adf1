"""Fidelity: the gradient that TokenSeek gives beside the full gradient of the same micro-batch."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def compare_gradients(model: nn.Module, loss_of: Callable[[bool], Tensor]) -> dict[str, float]:
    """
    Cosine and norm ratio of the selected gradient with the full one; leaves every `.grad` as it is.

    Holds two copies of the trained parameters' gradients for a moment.

    Args:
        model (`nn.Module`): whose trainable parameters are compared.
        loss_of (`Callable`): gives the summed loss, plainly if called with `True`.

    Returns:
        `dict`: `gradient_cosine` and `gradient_norm_ratio` (selected / full).
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    full = torch.autograd.grad(loss_of(True), parameters, allow_unused=True)
    selected = torch.autograd.grad(loss_of(False), parameters, allow_unused=True)
    pairs = [(s.double(), f.double()) for s, f in zip(selected, full, strict=True) if s is not None and f is not None]
    dot = sum(torch.sum(s * f) for s, f in pairs)
    own, other = (sum(part.square().sum() for part in side).sqrt() for side in zip(*pairs, strict=True))
    return {"gradient_cosine": float(dot / (own * other)), "gradient_norm_ratio": float(own / other)}
