"""In which dtype a linear layer computes."""

import torch


def linear_dtype(weight: torch.Tensor) -> torch.dtype:
    """What a linear layer with this weight computes in: the autocast dtype, or its own."""
    device = weight.device.type
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return weight.dtype
