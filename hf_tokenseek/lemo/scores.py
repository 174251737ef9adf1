"""What makes a block of tokens worth keeping, in one interface."""

from collections.abc import Callable

import torch
from torch import Tensor

from tokenseek_kernels import block_scores

from ..seeds import mixed_seed
from .blocks import Blocks
from .config import LemoConfig


class Scorer:
    """
    Scores the blocks of one forward pass, layer by layer.

    Args:
        config ([`LemoConfig`]): which score, and what it knows.
        place (`tuple[int, ...]`): step and micro-step, which seed all that is random.
        predictor (*optional*): the trained predictor of `score="predictor"`.
    """

    def __init__(self, config: LemoConfig, place: tuple[int, ...], predictor=None):
        self.config, self._place, self._predictor = config, place, predictor

    def __call__(self, layer: int, call, elimination) -> Tensor:
        """
        Scores of a layer's blocks, `(batch, blocks)`, float32; anything where a block does not exist.

        Args:
            layer (`int`): index of the layer.
            call ([`LayerCall`]): its call.
            elimination ([`Elimination`]): of the forward pass, with the choices of the layers below.
        """
        return _SCORES[self.config.score](self, layer, call, elimination)

    def oracle(self, layer: int, call, blocks: Blocks) -> Tensor:
        """The paper's score, of all queries and keys: costs a forward of the layer without gradient."""
        rows = None if self.config.rope else _one_place(call, blocks)
        peek = call.peek(call.hidden, rows)
        # in the order of blocks: padding leaves no holes in them
        rows = blocks.tokens.flatten(1).clamp(min=0)
        query, key = (_at(rows, states) for states in (peek.query, peek.key))
        segments = blocks.documents.flatten(1)
        queries = self.config.queries
        if queries == "labelled":
            # a query of zeros scores nothing
            asking = blocks.asking(queries)[:, :, None].expand_as(blocks.tokens).flatten(1)
            query, queries = query.masked_fill(~asking[:, None, :, None], 0.0), "later"
        return block_scores(query, key, self.config.block, segments, queries=queries)

    def pooled(self, layer: int, call, blocks: Blocks) -> Tensor:
        """How much the blocks' mean queries look at each one's mean key: costs projections of one row a block."""
        tokens = blocks.tokens
        count = (tokens >= 0).sum(2)
        middle = tokens.gather(2, (count - 1).clamp(min=0)[:, :, None] // 2)[:, :, 0]
        rows = middle if self.config.rope else tokens[:, :1, 0].expand_as(middle)
        peek = call.peek(pool(call.hidden, blocks), rows)
        return looks(peek.query, peek.key, blocks, self.config.queries)

    def _random(self, layer: int, call, elimination) -> Tensor:
        generator = torch.Generator().manual_seed(mixed_seed(self.config.seed, *self._place, layer))
        blocks = elimination.blocks
        return torch.rand(len(blocks.counts), blocks.count, generator=generator).to(call.hidden.device)

    def _watched(self, layer: int, call, elimination) -> Tensor:
        return elimination.watch.scores

    def _recency(self, layer: int, call, elimination) -> Tensor:
        blocks = elimination.blocks
        index = torch.arange(blocks.count, dtype=torch.float32, device=call.hidden.device)
        return index.expand(len(blocks.counts), -1)

    def _predicted(self, layer: int, call, elimination) -> Tensor:
        blocks = elimination.blocks
        # from logarithms of shares to what has a mean
        return self._predictor.scores(layer, pool(call.hidden, blocks), blocks).clamp(max=80).exp()


_SCORES: dict[str, Callable] = {
    "pooled": lambda scorer, layer, call, elimination: scorer.pooled(layer, call, elimination.blocks),
    "oracle": lambda scorer, layer, call, elimination: scorer.oracle(layer, call, elimination.blocks),
    "predictor": Scorer._predicted,
    "previous_layer": Scorer._watched,
    "random": Scorer._random,
    "recency": Scorer._recency,
}


def pool(hidden: Tensor, blocks: Blocks) -> Tensor:
    """Means of the blocks' tokens, `(batch, blocks, width)`; zeros where a block does not exist."""
    slots = blocks.tokens.flatten(1)
    rows = _at(slots.clamp(min=0), hidden[:, None])[:, 0].masked_fill((slots < 0)[:, :, None], 0)
    count = (blocks.tokens >= 0).sum(2, keepdim=True).clamp(min=1)
    return rows.unflatten(1, blocks.tokens.shape[1:]).sum(2) / count


def looks(query: Tensor, key: Tensor, blocks: Blocks, queries: str) -> Tensor:
    """
    How much the blocks' queries look at each block's key, summed over heads, `(batch, blocks)` float32.

    Blocks see each other that share a document. A column sum of products is the product with a sum: time is linear in
    the blocks.

    Args:
        query (`torch.Tensor` of shape `(batch, heads, blocks, dim)`): one query a block.
        key (`torch.Tensor` of shape `(batch, kv_heads, blocks, dim)`): one key a block.
        blocks ([`Blocks`]): which these are of.
        queries (`str`): `"all"`, `"later"` (the block's own included) or `"earlier"` (likewise); `"labelled"` ones
            look as `"later"` ones.
    """
    query = query.float().masked_fill(~blocks.asking(queries)[:, None, :, None], 0.0)
    query = query.unflatten(1, (key.shape[1], -1)).sum(2)
    first, behind = blocks.reach
    own = torch.arange(blocks.count, device=query.device).expand_as(first)
    begin = own if queries in ("later", "labelled") else first
    end = own + 1 if queries == "earlier" else behind
    return (_summed(query, begin, end) * key.float()).sum((1, 3))


def askers(blocks: Blocks, queries: str) -> Tensor:
    """How many blocks that ask share a document with each block, at least 1, `(batch, blocks)` float32."""
    asking = blocks.asking(queries).float()[:, None, :, None]
    return _summed(asking, *blocks.reach)[:, 0, :, 0].clamp(min=1)


def _summed(states: Tensor, begin: Tensor, end: Tensor) -> Tensor:
    """Sums of `(batch, heads, blocks, dim)` from block `begin` to the one before `end`, both `(batch, blocks)`."""
    before = torch.nn.functional.pad(states.cumsum(2), (0, 0, 1, 0))
    return _at(end, before) - _at(begin, before)


def _at(rows: Tensor, states: Tensor) -> Tensor:
    """`(batch, heads, n, dim)` at `rows`, `(batch, heads, k, dim)`."""
    return states.gather(2, rows[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))


def _one_place(call, blocks: Blocks) -> Tensor:
    """Every token at the place of its sequence's first one: rotations cancel."""
    return blocks.tokens[:, :1, 0].clamp(min=0).expand(-1, call.hidden.shape[1])
