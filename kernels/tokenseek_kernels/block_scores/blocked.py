"""Plain torch implementation, blocked over query rows."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..scores import group_heads, row_blocks, wide
from .reference import allowed


def block_scores(query: Tensor, key: Tensor, block: int, segments: Tensor | None, queries: str) -> Tensor:
    """As [`block_scores`], the door."""
    batch, heads, n, _ = query.shape
    index, keys = torch.arange(n, device=query.device), wide(key)
    spare = -n % block
    scores = keys.new_zeros(batch, (n + spare) // block)
    for part in row_blocks(scores.shape[1], 8 * batch * heads * n * block):
        rows = slice(part.start * block, min(part.stop * block, n))
        columns = {"all": slice(0, n), "later": slice(0, rows.stop), "earlier": slice(rows.start, n)}[queries]
        pairs = _pairs(wide(query[:, :, rows]), keys[:, :, columns])
        pairs.masked_fill_(~allowed(index[rows], index[columns], segments, queries), 0.0)
        # behind the last row and the last column, of which one may end in front of a whole block
        pairs = F.pad(pairs, (0, -pairs.shape[2] % block, 0, -pairs.shape[1] % block))
        first = columns.start // block
        tiles = pairs.unflatten(2, (-1, block)).unflatten(1, (-1, block)).amax((2, 4))
        scores[:, first : first + tiles.shape[2]] += tiles.sum(1)
    return scores


def _pairs(query: Tensor, key: Tensor) -> Tensor:
    """`(batch, rows, keys)`: products of queries and keys, the positive ones of all heads, over the heads."""
    heads = query.shape[1]
    products = group_heads(query, key.shape[1]) @ key.transpose(-1, -2)
    return products.relu_().view(len(query), heads, -1, key.shape[2]).mean(1)
