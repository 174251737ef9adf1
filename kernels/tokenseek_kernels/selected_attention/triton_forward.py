"""Triton kernel of the forward pass: online softmax over blocks of keys, the rule on positions in registers."""

import triton
import triton.language as tl

from ..triton_scores import (
    LOG2E,
    extent,
    first_seen,
    in_reach,
    keys_read,
    load_tile,
    positions_of,
    segments_of,
    softcapped,
    store_tile,
    visible,
    windows_begin,
)


@triton.jit(do_not_specialize=["n_rows", "n_keys", "group", "window"])
def forward_kernel(
    query,
    key,
    value,
    rows,
    segments,
    first_keys,
    sinks,
    output,
    lse,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    n_rows,
    n_keys,
    group,
    window,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """
    One program per block of selected rows, head and sequence:

        output_i = sum_j exp(s_ij - lse_i) v_j          lse_i = log(sum_j exp s_ij + exp sink)

    Without `value` it writes the log-sum-exp only.
    """
    WIDE: tl.constexpr = lse.dtype.element_ty
    # the last rows see the most keys, so they start first
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head, heads = tl.program_id(1), tl.num_programs(1)
    kv_head = (head // group).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)

    slot = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    position = positions_of(rows + batch * n_rows, slot, n_rows)
    p_segments = None if segments is None else segments + batch * n_keys
    own = segments_of(p_segments, position, position >= 0, -2)
    p_first = None if first_keys is None else first_keys + batch * n_rows
    own_first = first_seen(p_first, slot, n_rows)
    p_query = query + batch * q_batch + head.to(tl.int64) * q_head
    q = load_tile(p_query, q_row, slot.to(tl.int64), position >= 0, DIM, BLOCK_DIM)
    p_key = key + batch * k_batch + kv_head * k_head
    offset = tl.arange(0, BLOCK_KEYS)

    # `top` is the largest score so far, `total` the sum of exp2(score - top), `weighted` the same sum with the values
    top = tl.full([BLOCK_ROWS], float("-inf"), WIDE)
    total = tl.zeros([BLOCK_ROWS], WIDE)
    weighted = tl.zeros([BLOCK_ROWS, BLOCK_VALUE], WIDE)
    first, last = extent(position)
    lowest, highest = extent(own)
    earliest, latest = windows_begin(own_first, position, first, last, first_keys, window)
    begin, whole_begin, whole_end, end = keys_read(first, last, earliest, latest, segments, window, BLOCK_KEYS)
    gap = whole_end - whole_begin
    # first the keys that all queries of the block see, then the margins in front of and behind them
    for MARGIN in tl.static_range(2):
        for step in range(begin if MARGIN else whole_begin, end - gap if MARGIN else whole_end, BLOCK_KEYS):
            start, reached = step, None
            if MARGIN:
                start = step + tl.where(step < whole_begin, 0, gap)
                document = segments_of(p_segments, start + offset, start + offset < n_keys, -1)
                seen = visible(
                    position, own, own_first, start + offset, document, segments, first_keys, window, KEY_AXIS=1
                )
                reached = in_reach(start + offset, document, earliest, last, lowest, highest, segments, window)
            far_start = tl.cast(start, tl.int64)
            k = load_tile(p_key + far_start * k_row, k_row, offset, reached, DIM, BLOCK_DIM)
            products = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=WIDE)
            scores = softcapped(products, SCALE, SOFTCAP)
            if MARGIN:
                scores = tl.where(seen, scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            # the largest score of a query that has not seen anything yet is -inf, which -inf cannot be reduced by
            base = tl.where(higher == float("-inf"), 0.0, higher)
            weights, shrink = tl.exp2(scores - base[:, None]), tl.exp2(top - base)
            total = total * shrink + tl.sum(weights, 1)
            if value is not None:
                p_value = value + batch * v_batch + kv_head * v_head + far_start * v_row
                v = load_tile(p_value, v_row, offset, reached, VALUE_DIM, BLOCK_VALUE)
                weighted *= shrink[:, None]
                weighted = tl.dot(weights.to(v.dtype), v, weighted, input_precision=PRECISION, out_dtype=WIDE)
            top = higher

    empty = (top == float("-inf")) | (position < 0)
    if sinks is not None:
        # a sink takes part in the normaliser only
        sink = tl.load(sinks + head).to(WIDE) * LOG2E
        higher = tl.maximum(top, sink)
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.exp2(sink - higher)
        weighted *= shrink[:, None]
        top = higher
    total = tl.where(empty, 1.0, total)
    exists = slot < n_rows
    natural = tl.where(empty, float("inf"), (top + tl.log2(total)) / LOG2E)
    tl.store(lse + (batch * heads + head) * n_rows + slot, natural, mask=exists)
    if value is not None:
        result = tl.where(empty[:, None], 0.0, weighted / total[:, None])
        p_output = output + (batch * n_rows * heads + head) * VALUE_DIM
        store_tile(p_output, heads * VALUE_DIM, slot.to(tl.int64), exists, result, VALUE_DIM, BLOCK_VALUE)
