"""
Plain torch, sequence by sequence: torch copies whole rows of a matrix several times faster than it gathers and
scatters elements. Nothing depends on what `rows` holds, so that no device is waited for and fake tensors run as well.
"""

import torch
from torch import Tensor


def gather_rows(states: Tensor, rows: Tensor) -> Tensor:
    """`(batch, k, width)`: the rows, zeros in empty slots."""
    kept = states.new_empty(*rows.shape, states.shape[-1])
    for own, picked, out in zip(states, rows.clamp(min=0), kept, strict=True):
        torch.index_select(own, 0, picked, out=out)
    return kept.masked_fill_((rows < 0)[..., None], 0)


def write_rows_(states: Tensor, fresh: Tensor, rows: Tensor) -> None:
    """Writes `fresh` over the rows of `states`; empty slots write nothing."""
    taken = (rows >= 0).sum(1, keepdim=True)
    # an empty slot writes what the last one with a row writes
    slots = torch.arange(rows.shape[1], device=rows.device).minimum((taken - 1).clamp(min=0))
    places = rows.gather(1, slots).clamp(min=0)
    # and where there is none, into the first row, which gets its own back
    first = states[:, :1].clone()
    for own, values, slot, place in zip(states, fresh, slots, places, strict=True):
        own.index_copy_(0, place, values.index_select(0, slot))
    states[:, :1] = torch.where((taken > 0)[..., None], states[:, :1], first)
