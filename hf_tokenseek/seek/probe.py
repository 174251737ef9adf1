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
        `dict`: `gradient_cosine` and `gradient_norm_ratio` (selected / full); empty where either gradient is zero.

    Raises:
        ValueError: gradient checkpointing is reentrant, which knows no gradients beside `.grad`.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    try:
        full, selected = (torch.autograd.grad(loss_of(p), parameters, allow_unused=True) for p in (True, False))
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise ValueError(
            "`probe_steps` does not work with reentrant gradient checkpointing. Set gradient_checkpointing_kwargs="
            "{'use_reentrant': False}, or probe_steps=0."
        ) from error
    dot, own, other = 0.0, 0.0, 0.0
    for parameter, *pair in zip(parameters, selected, full, strict=True):
        # where only one of the two reaches a parameter, the other's gradient is zero
        s, f = (torch.zeros_like(parameter) if part is None else part.double() for part in pair)
        dot, own, other = dot + (s * f).sum(), own + s.square().sum(), other + f.square().sum()
    if not (own > 0 and other > 0):
        return {}
    own, other = own.sqrt(), other.sqrt()
    return {"gradient_cosine": float(dot / (own * other)), "gradient_norm_ratio": float(own / other)}
