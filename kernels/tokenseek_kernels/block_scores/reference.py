"""The definition, with the scores of all pairs of tokens; and the rule on pairs, which the blocked form shares."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..scores import wide


def block_scores_reference(query: Tensor, key: Tensor, block: int, segments: Tensor | None, queries: str) -> Tensor:
    """Same arguments and result as [`block_scores`]; builds `n x n` matrices."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    pairs = (wide(query) @ wide(key).transpose(-1, -2)).clamp(min=0).mean(1)
    index = torch.arange(query.shape[2], device=query.device)
    # every score is at least 0, which so stands for a pair that is not allowed, and for one that is not there
    pairs = pairs.masked_fill(~allowed(index, index, segments, queries), 0.0)
    spare = -len(index) % block
    pairs = F.pad(pairs, (0, spare, 0, spare))
    return pairs.unflatten(2, (-1, block)).unflatten(1, (-1, block)).amax((2, 4)).sum(1)


def allowed(rows: Tensor, columns: Tensor, segments: Tensor | None, queries: str) -> Tensor:
    """
    Which queries count for which keys, `(batch or 1, rows, columns)`.

    Args:
        rows, columns (`torch.LongTensor` of shapes `(rows,)` and `(columns,)`):
            Index of each query and of each key in its sequence.
        segments, queries: as in [`block_scores`].
    """
    query, key = rows[:, None], columns
    if queries == "all":
        pairs = torch.ones(len(rows), len(columns), dtype=torch.bool, device=rows.device)
    else:
        pairs = query >= key if queries == "later" else query <= key
    if segments is None:
        return pairs[None]
    own, other = segments[:, rows, None], segments[:, None, columns]
    return pairs & (own == other) & (own >= 0)
