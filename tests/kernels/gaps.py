"""Tokens of which others have been left out: where they stood, and what a window in tokens then says."""

import torch


def positions_with_gaps(batch: int, keys: int) -> torch.Tensor:
    """`(batch, keys)`, ascending: runs without a gap, short gaps and long ones, others in each sequence."""
    generator = torch.Generator().manual_seed(7)
    steps = torch.tensor([1, 1, 1, 2, 5, 12])[torch.randint(6, (batch, keys), generator=generator)]
    return steps.cumsum(1)


def first_keys_of(positions: torch.Tensor, window: int) -> torch.Tensor:
    """Of each query the first key that is less than a window in front of it, from a table of all pairs."""
    seen = positions[:, :, None] - positions[:, None, :] < window
    return seen.int().argmax(-1)


def with_first_keys(options: dict, batch: int, keys: int) -> dict:
    """The same options, `gaps` in them as what it stands for."""
    options = dict(options)
    if options.pop("gaps", False):
        options["first_keys"] = first_keys_of(positions_with_gaps(batch, keys), options["window"])
    return options
