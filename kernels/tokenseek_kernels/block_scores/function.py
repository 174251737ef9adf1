"""Block scores: how much blocks of keys are looked at."""

import torch
from torch import Tensor

from ..custom_op import custom_op
from ..precision import without_autocast
from ..scores import resolve_attention_impl, wide_dtype
from . import blocked
from .reference import block_scores_reference

QUERIES = ("all", "later", "earlier")
# rows of the smallest matrix product that tensor cores take
SMALLEST_TILE = 16


@custom_op("tokenseek::block_scores")
def _scores_op(query: Tensor, key: Tensor, block: int, segments: Tensor | None, queries: str, impl: str) -> Tensor:
    module = blocked
    if impl == "triton":
        from . import triton as module
    return module.block_scores(query, key, block, segments, queries)


@_scores_op.register_fake
def _(query, key, block, segments, queries, impl):
    return query.new_empty(len(query), -(-query.shape[2] // block), dtype=wide_dtype(query))


@torch.no_grad()
def block_scores(
    query: Tensor,
    key: Tensor,
    block: int,
    segments: Tensor | None = None,
    *,
    queries: str = "all",
    impl: str = "auto",
) -> Tensor:
    """
    How much each block of keys is looked at, the token informativeness of
    [LeMo](https://huggingface.co/papers/2501.09767). A pair of tokens scores the mean over heads of
    `max(0, query . key)`, a tile (block of queries x block of keys) its largest pair, a block of keys the sum of its
    tiles. No gradient; memory linear in n; sums in float32; deterministic.

    Args:
        query (`torch.Tensor` of shape `(batch, heads, n, dim)`):
            Queries of all tokens. There is no scale: scores are as long as `query` is.
        key (`torch.Tensor` of shape `(batch, kv_heads, n, dim)`):
            Their keys.
        block (`int`):
            Tokens a block; the last one may be shorter.
        segments (`torch.LongTensor` of shape `(batch, n)`, *optional*):
            Document number of every token, -1 for padding: only pairs of the same document count, of padding none.
        queries (`str`, *optional*, defaults to `"all"`):
            Which queries count for a key: `"all"`, as published, which looks into the future; `"later"`, its own and
            those behind it, as causal attention has them; `"earlier"`, its own and those in front of it, so that the
            score knows nothing of later tokens.
        impl (`str`, *optional*, defaults to `"auto"`):
            `"auto"` (Triton on a GPU, torch on the CPU, for heads that the Triton kernel cannot hold in registers and
            for blocks that are not a power of two of at least 16), `"triton"`, `"torch"` or `"reference"`.

    Returns:
        `torch.FloatTensor` of shape `(batch, ceil(n / block))`, at least 0, and 0 for a block of padding. float64 for
        float64 inputs.

    Raises:
        ValueError: shapes do not fit together, `block` or `queries` are not as above, or `impl` is unknown or cannot
            run here.
    """
    _check(query, key, block, segments, queries)
    impl = _resolve(impl, query, block)
    with without_autocast(query.device):
        if impl == "reference":
            return block_scores_reference(query, key, block, segments, queries)
        return _scores_op(query, key, block, segments, queries, impl)


def _resolve(impl: str, query: Tensor, block: int) -> str:
    resolved = resolve_attention_impl(impl, query)
    if resolved != "triton" or (block >= SMALLEST_TILE and block & (block - 1) == 0):
        return resolved
    if impl == "triton":
        raise ValueError(
            f"impl='triton' takes blocks of a power of two of at least {SMALLEST_TILE} tokens, got {block}. Use "
            "impl='auto'."
        )
    return "torch"


def _check(query: Tensor, key: Tensor, block: int, segments: Tensor | None, queries: str) -> None:
    if block < 1:
        raise ValueError(f"`block` should be at least 1 token, got {block}.")
    if queries not in QUERIES:
        raise ValueError(f"`queries` should be one of {list(QUERIES)}, got {queries!r}.")
    batch, heads, n, dim = query.shape
    if key.shape != (batch, key.shape[1], n, dim) or heads % key.shape[1]:
        raise ValueError(
            f"`key` {tuple(key.shape)} must have the shape of `query` {tuple(query.shape)}, but that its heads may be "
            "fewer by a whole factor."
        )
    if segments is not None and segments.shape != (batch, n):
        raise ValueError(f"`segments` {tuple(segments.shape)} must be (batch, n) of query {tuple(query.shape)}.")
