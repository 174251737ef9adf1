"""In which dtype things are computed."""

from contextlib import AbstractContextManager, nullcontext

import torch


def linear_dtype(weight: torch.Tensor) -> torch.dtype:
    """What a linear layer with this weight computes in: the autocast dtype, or its own."""
    return linear_dtype_of(weight.dtype, weight.device)


def linear_dtype_of(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """[`linear_dtype`] of a tensor that is not there yet."""
    if torch.is_autocast_enabled(device.type) and dtype != torch.float64:
        return torch.get_autocast_dtype(device.type)
    return dtype


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Sums that are kept in float32 stay there: autocast would round them on the way."""
    on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()
