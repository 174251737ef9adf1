"""Sizes of parameters. One that ZeRO-3 has partitioned is empty until it is used, and remembers what it was."""

import torch
from torch import nn


def shape_of(parameter: nn.Parameter) -> torch.Size:
    """The whole parameter's shape."""
    return getattr(parameter, "ds_shape", parameter.shape)


def numel_of(parameter: nn.Parameter) -> int:
    """The whole parameter's number of elements."""
    return getattr(parameter, "ds_numel", parameter.numel())


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 partitions the parameter: it is whole only in calls of its module, forward and backward."""
    return hasattr(parameter, "ds_shape")


def trained_share(model: nn.Module) -> float:
    """Share of the model's weights that is trained: 1 in full fine-tuning, a few percent with adapters."""
    sizes = [(numel_of(p), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trained in sizes if trained) / max(1, sum(size for size, _ in sizes))
