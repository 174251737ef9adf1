"""Triton implementation: a program keeps a tile of pairs in registers while it adds up the heads."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compilation import Compilation, Target, target_of
from ..scores import wide_dtype
from ..selected_attention.triton import (
    DTYPES,
    Blocks,
    Table,
    aligned,
    choose_blocks,
    launch_options,
    padded,
    strides,
)
from ..triton_scores import load_tile, segments_of

# as the tables of selected_attention; a block of tokens that is larger is worked on in parts
TILES: Table = {
    (64, 2): (Blocks(64, 64, 256, 3), Blocks(64, 64, 256, 3)),
    (128, 2): (Blocks(64, 64, 256, 3), Blocks(64, 64, 256, 2)),
    (256, 2): (Blocks(64, 64, 256, 2), Blocks(64, 64, 256, 2)),
    (64, 4): (Blocks(64, 64, 256, 1), Blocks(32, 64, 256, 1)),
    (32, 8): (Blocks(32, 32, 128, 1), Blocks(32, 32, 128, 1)),
}
# blocks below it make smaller tiles, for half as many threads
LARGEST_TILE = 64
# that few blocks are shared out to: two on each multiprocessor of an H100
PROGRAMS = 256


@triton.jit
def _allowed(row, column, segments, n, QUERIES: tl.constexpr):
    """Which pairs count, [rows, columns]; what lies behind the last token scores 0 anyway."""
    own, other = row[:, None], column[None, :]
    pairs = (own < n) & (other < n)
    if QUERIES == "later":
        pairs &= own >= other
    if QUERIES == "earlier":
        pairs &= own <= other
    if segments is not None:
        pairs &= segments_of(segments, row, row < n, -2)[:, None] == segments_of(segments, column, column < n, -1)
    return pairs


@triton.jit
def _largest_pair(
    query,
    key,
    segments,
    q_head,
    q_row,
    k_head,
    k_row,
    begin_row,
    begin_column,
    n,
    heads,
    group,
    WIDE: tl.constexpr,
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The largest sum over heads of `max(0, q_i . k_j)` of the allowed pairs of a tile; 0 if there is none."""
    row = begin_row + tl.arange(0, BLOCK_ROWS)
    column = begin_column + tl.arange(0, BLOCK_KEYS)
    pairs = tl.zeros([BLOCK_ROWS, BLOCK_KEYS], WIDE)
    for step in range(0, heads):
        head = tl.cast(step, tl.int64)
        q = load_tile(query + head * q_head, q_row, row.to(tl.int64), row < n, DIM, BLOCK_DIM)
        k = load_tile(key + head // group * k_head, k_row, column.to(tl.int64), column < n, DIM, BLOCK_DIM)
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=WIDE)
        pairs += tl.maximum(products, 0.0)
    return tl.max(tl.where(_allowed(row, column, segments, n, QUERIES), pairs, 0.0))


@triton.jit(do_not_specialize=["n", "heads", "group"])
def scores_kernel(
    query,
    key,
    segments,
    scores,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    n,
    heads,
    group,
    QUERIES: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """
    One program per block of keys, share of the blocks of queries, and sequence:

        score = sum over blocks of queries of the largest pair

    A share is every so many blocks, so that "later" and "earlier" leave all of them about as much to do.
    """
    WIDE: tl.constexpr = scores.dtype.element_ty
    own, share = tl.program_id(0), tl.program_id(1)
    blocks, shares = tl.num_programs(0), tl.num_programs(1)
    batch = tl.program_id(2).to(tl.int64)
    p_query, p_key = query + batch * q_batch, key + batch * k_batch
    p_segments = None if segments is None else segments + batch * n

    first = own if QUERIES == "later" else 0
    end = own + 1 if QUERIES == "earlier" else blocks
    score = tl.full([], 0.0, WIDE)
    for other in range(first + share, end, shares):
        largest = tl.full([], 0.0, WIDE)
        for begin_row in range(other * BLOCK, (other + 1) * BLOCK, BLOCK_ROWS):
            for begin_column in range(own * BLOCK, (own + 1) * BLOCK, BLOCK_KEYS):
                pair = _largest_pair(
                    p_query,
                    p_key,
                    p_segments,
                    q_head,
                    q_row,
                    k_head,
                    k_row,
                    begin_row,
                    begin_column,
                    n,
                    heads,
                    group,
                    WIDE,
                    QUERIES,
                    DIM,
                    BLOCK_DIM,
                    BLOCK_ROWS,
                    BLOCK_KEYS,
                    PRECISION,
                )
                largest = tl.maximum(largest, pair)
        score += largest
    tl.store(scores + (batch * shares + share) * blocks + own, score)


def choose_tile(block: int, dim: int, dtype: torch.dtype, target: Target) -> Blocks:
    """The part of a tile of `block x block` pairs that a program holds at a time."""
    rows, keys, threads, stages = choose_blocks(TILES, dim, dtype, target)
    threads = threads if block >= LARGEST_TILE else threads // 2
    return Blocks(min(rows, block), min(keys, block), threads, stages)


def block_scores(query: Tensor, key: Tensor, block: int, segments: Tensor | None, queries: str) -> Tensor:
    """As [`block_scores`], the door. Shares of a block's score are added up by torch: no atomics, the same bits."""
    batch, heads, n, dim = query.shape
    query, key = aligned(query), aligned(key)
    blocks = triton.cdiv(n, block)
    shares = min(blocks, triton.cdiv(PROGRAMS, blocks * batch))
    scores = query.new_empty(batch, shares, blocks, dtype=wide_dtype(query))
    target = target_of(query)
    with torch.cuda.device_of(query):
        scores_kernel[blocks, shares, batch](
            query=query,
            key=key,
            segments=None if segments is None else segments.contiguous(),
            scores=scores,
            **strides("q", query),
            **strides("k", key),
            n=n,
            heads=heads,
            group=heads // key.shape[1],
            QUERIES=queries,
            BLOCK=block,
            DIM=dim,
            BLOCK_DIM=padded(dim),
            **launch_options(choose_tile(block, dim, query.dtype, target), query.dtype, target),
        )
    return scores.sum(1) / heads


# What the gate compiles: every tile of the table and every smaller one, a larger block, the dtypes, a head size that
# is no power of two; with documents, and without for the usual block.
GATED = [
    *((torch.bfloat16, dim, block, "later") for dim in (64, 128, 256) for block in (16, 32, 64)),
    *((torch.bfloat16, dim, 64, "all") for dim in (64, 128, 256)),
    *((torch.float32, 64, block, "later") for block in (16, 32, 64)),
    *((torch.float64, 32, block, "later") for block in (16, 32, 64)),
    (torch.bfloat16, 80, 64, "earlier"),
    (torch.bfloat16, 128, 256, "earlier"),
    (torch.float16, 128, 64, "later"),
]


def compilations(target: Target) -> list[Compilation]:
    """The kernel of this operation, with every configuration that a launch may choose on `target`."""
    return [_compilation(*case, target) for case in GATED]


def _compilation(dtype: torch.dtype, dim: int, block: int, queries: str, target: Target) -> Compilation:
    options = launch_options(choose_tile(block, dim, dtype, target), dtype, target)
    num_warps, num_stages = options.pop("num_warps"), options.pop("num_stages")
    constants = {"QUERIES": queries, "BLOCK": block, "DIM": dim, "BLOCK_DIM": padded(dim), **options}
    if queries == "all":
        constants["segments"] = None
    types = {name: "i32" for name in scores_kernel.arg_names if name not in constants}
    types |= dict.fromkeys(("query", "key"), f"*{DTYPES[dtype]}") | {"scores": f"*{DTYPES[_wide(dtype)]}"}
    if queries != "all":
        types["segments"] = "*i64"
    name = f"block_scores {DTYPES[dtype]} dim {dim} block {block} {queries}"
    return Compilation(name, scores_kernel, types, constants, num_warps, num_stages, matmul=dtype != torch.float64)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
