"""Row by row, with gradients by autograd."""

from collections.abc import Iterator

from torch import Tensor


def split_rows_reference(states: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Same arguments and results as [`split_rows`]."""
    kept = states.new_zeros(*rows.shape, states.shape[-1])
    for sequence, slot, row in _taken(rows):
        kept[sequence, slot] = states[sequence, row]
    return states.view_as(states), kept


def join_rows_reference(rest: Tensor, fresh: Tensor, rows: Tensor) -> Tensor:
    """Same arguments and result as [`join_rows`], a new tensor."""
    joined = rest.clone()
    for sequence, slot, row in _taken(rows):
        joined[sequence, row] = fresh[sequence, slot]
    return joined


def _taken(rows: Tensor) -> Iterator[tuple[int, int, int]]:
    for sequence, own in enumerate(rows.tolist()):
        yield from ((sequence, slot, row) for slot, row in enumerate(own) if row >= 0)
