"""Triton implementation: column sums of softmax attention, in registers of one program per block of keys."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compilation import Compilation, Target, target_of
from ..scores import wide_dtype
from ..selected_attention.triton import (
    ABSENT,
    DTYPES,
    GATED,
    Blocks,
    Table,
    aligned,
    choose_blocks,
    compilation,
    launch_options,
    log_sum_exp,
    padded,
    rule,
    strides,
)
from ..triton_scores import (
    LOG2E,
    NEVER,
    first_seen,
    first_slot_from,
    load_tile,
    positions_of,
    segments_of,
    slots_before,
    softcapped,
    visible,
)


@triton.jit(do_not_specialize=["n_rows", "n_keys", "group", "window"])
def mass_kernel(
    query,
    key,
    lse,
    rows,
    segments,
    first_keys,
    mass,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    n_rows,
    n_keys,
    group,
    window,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """
    One program per block of keys, key/value head and sequence, over the query rows behind them and all heads of the
    group, so that nothing is added up across programs:

        mass_j = sum_i exp(s_ij - lse_i)
    """
    WIDE: tl.constexpr = lse.dtype.element_ty
    begin_key = tl.program_id(0) * BLOCK_KEYS
    column = begin_key + tl.arange(0, BLOCK_KEYS)
    kv_head, kv_heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    batch = tl.program_id(2).to(tl.int64)
    p_rows = rows + batch * n_rows

    exists = column < n_keys
    p_segments = None if segments is None else segments + batch * n_keys
    own_document = segments_of(p_segments, column, exists, -1)
    p_first = None if first_keys is None else first_keys + batch * n_rows
    k = load_tile(key + batch * k_batch + kv_head * k_head, k_row, column.to(tl.int64), exists, DIM, BLOCK_DIM)

    total = tl.zeros([BLOCK_KEYS], WIDE)
    offset = tl.arange(0, BLOCK_ROWS)
    # rows ascend: those in front of the keys see none of them, those behind see all, but for the window and documents
    begin = first_slot_from(p_rows, n_rows, begin_key, 1024) // BLOCK_ROWS * BLOCK_ROWS
    limit = NEVER if window is None else begin_key + BLOCK_KEYS - 1 + window
    end = slots_before(p_rows, n_rows, limit, 1024)
    whole_begin = end
    if segments is None and window is None:
        first = first_slot_from(p_rows, n_rows, begin_key + BLOCK_KEYS - 1, 1024)
        whole_begin = tl.minimum(tl.cdiv(first, BLOCK_ROWS) * BLOCK_ROWS, end)
    for MARGIN in tl.static_range(2):
        lower, upper = begin if MARGIN else whole_begin, whole_begin if MARGIN else end
        blocks = tl.cdiv(tl.maximum(upper - lower, 0), BLOCK_ROWS)
        for step in range(0, group * blocks):
            head = kv_head * group + step // blocks
            first = lower + step % blocks * BLOCK_ROWS
            slot = first + offset
            p_query = query + batch * q_batch + head * q_head + first.to(tl.int64) * q_row
            q = load_tile(p_query, q_row, offset, slot < n_rows, DIM, BLOCK_DIM)
            # +inf, so that p is 0, where a row sees nothing, an empty slot's included
            p_lse = lse + (batch * kv_heads * group + head) * n_rows
            row_lse = tl.load(p_lse + slot, mask=slot < n_rows, other=float("inf")) * LOG2E
            products = tl.dot(k, tl.trans(q), input_precision=PRECISION, out_dtype=WIDE)
            p = tl.exp2(softcapped(products, SCALE, SOFTCAP) - row_lse[None, :])
            if MARGIN:
                position = positions_of(p_rows, slot, n_rows)
                document = segments_of(p_segments, position, position >= 0, -2)
                row_first = first_seen(p_first, slot, n_rows)
                seen = visible(
                    position, document, row_first, column, own_document, segments, first_keys, window, KEY_AXIS=0
                )
                p = tl.where(seen, p, 0.0)
            total += tl.sum(p, 1)
    tl.store(mass + (batch * kv_heads + kv_head) * n_keys + column, total, mask=exists)


# as the tables of selected_attention
MASS: Table = {
    (64, 2): (Blocks(64, 128, 256, 3), Blocks(64, 128, 256, 2)),
    (128, 2): (Blocks(64, 128, 256, 3), Blocks(64, 128, 256, 3)),
    (256, 2): (Blocks(32, 64, 256, 2), Blocks(64, 64, 256, 2)),
    (64, 4): (Blocks(64, 64, 256, 2), Blocks(32, 64, 256, 2)),
    (32, 8): (Blocks(16, 16, 128, 1), Blocks(16, 16, 128, 1)),
}


def attention_mass(query, key, rows, segments, scale, softcap, window, first_keys, sinks, lse) -> Tensor:
    """As [`attention_mass`], the door. Without `lse` a first pass over the scores computes it."""
    if lse is None:
        lse = log_sum_exp(query, key, rows, segments, scale, softcap, window, first_keys, sinks)
    batch, kv_heads, n_keys, dim = key.shape
    query, key = aligned(query), aligned(key)
    mass = query.new_empty(batch, kv_heads, n_keys, dtype=wide_dtype(query))
    target = target_of(query)
    blocks = choose_blocks(MASS, dim, query.dtype, target)
    with torch.cuda.device_of(query):
        mass_kernel[triton.cdiv(n_keys, blocks.keys), kv_heads, batch](
            query=query,
            key=key,
            lse=lse.to(mass.dtype).contiguous(),
            rows=rows.contiguous(),
            segments=None if segments is None else segments.contiguous(),
            mass=mass,
            **strides("q", query),
            **strides("k", key),
            **rule(query, key, rows, scale, softcap, window, first_keys),
            DIM=dim,
            BLOCK_DIM=padded(dim),
            **launch_options(blocks, query.dtype, target),
        )
    return mass.sum(1).float()


def compilations(target: Target) -> list[Compilation]:
    """The kernel of this operation, with every configuration that a launch may choose on `target`."""
    return [
        compilation(
            f"attention_mass {DTYPES[dtype]} dim {dim} {options}",
            mass_kernel,
            choose_blocks(MASS, dim, dtype, target),
            dtype,
            target,
            ABSENT[options],
            DIM=dim,
            BLOCK_DIM=padded(dim),
        )
        for dtype, dim, _, options in GATED
    ]
