"""Triton kernels of the backward pass: gradients of the queries over all keys, of K and V at the selected columns."""

import triton
import triton.language as tl

from ..triton_scores import (
    LOG2E,
    NEVER,
    extent,
    first_seen,
    in_reach,
    keys_read,
    load_tile,
    positions_of,
    segments_of,
    slots_before,
    softcap_slope,
    softcapped,
    store_tile,
    visible,
    windows_begin,
)


@triton.jit(do_not_specialize=["n_rows", "n_keys", "group", "window"])
def query_gradient_kernel(
    grad,
    query,
    key,
    value,
    output,
    lse,
    rows,
    segments,
    first_keys,
    delta,
    d_query,
    g_batch,
    g_head,
    g_row,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    o_batch,
    o_head,
    o_row,
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
    One program per block of selected rows, head and sequence, over all keys they see:

        delta_i = do_i . o_i        ds_ij = p_ij (do_i . v_j - delta_i) slope_ij        dq_i = scale sum_j ds_ij k_j
    """
    WIDE: tl.constexpr = lse.dtype.element_ty
    # the last rows see the most keys, so they start first
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head, heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    kv_head = head // group
    batch = tl.program_id(2).to(tl.int64)

    slot = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    exists, far_slot = slot < n_rows, slot.to(tl.int64)
    position = positions_of(rows + batch * n_rows, slot, n_rows)
    p_segments = None if segments is None else segments + batch * n_keys
    own = segments_of(p_segments, position, position >= 0, -2)
    p_first = None if first_keys is None else first_keys + batch * n_rows
    own_first = first_seen(p_first, slot, n_rows)
    q = load_tile(query + batch * q_batch + head * q_head, q_row, far_slot, position >= 0, DIM, BLOCK_DIM)
    g = load_tile(grad + batch * g_batch + head * g_head, g_row, far_slot, position >= 0, VALUE_DIM, BLOCK_VALUE)
    o = load_tile(output + batch * o_batch + head * o_head, o_row, far_slot, position >= 0, VALUE_DIM, BLOCK_VALUE)
    own_delta = tl.sum(g.to(WIDE) * o.to(WIDE), 1)
    vector = (batch * heads + head) * n_rows + slot
    tl.store(delta + vector, own_delta, mask=exists)
    own_lse = tl.load(lse + vector, mask=exists, other=float("inf")) * LOG2E
    p_key = key + batch * k_batch + kv_head * k_head
    p_value = value + batch * v_batch + kv_head * v_head
    offset = tl.arange(0, BLOCK_KEYS)

    dq = tl.zeros([BLOCK_ROWS, BLOCK_DIM], WIDE)
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
            v = load_tile(p_value + far_start * v_row, v_row, offset, reached, VALUE_DIM, BLOCK_VALUE)
            products = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=WIDE)
            scores = softcapped(products, SCALE, SOFTCAP)
            p = tl.exp2(scores - own_lse[:, None])
            if MARGIN:
                p = tl.where(seen, p, 0.0)
            if SOFTCAP is not None:
                p *= softcap_slope(scores, SOFTCAP)
            dp = tl.dot(g, tl.trans(v), input_precision=PRECISION, out_dtype=WIDE)
            ds = p * (dp - own_delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION, out_dtype=WIDE)

    # (batch, rows, heads, dim)
    p_d_query = d_query + (batch * n_rows * heads + head) * DIM
    store_tile(p_d_query, heads * DIM, far_slot, exists, dq * (SCALE / LOG2E), DIM, BLOCK_DIM)


@triton.jit(do_not_specialize=["n_rows", "n_keys", "group", "window"])
def key_value_gradient_kernel(
    grad,
    query,
    key,
    value,
    lse,
    rows,
    segments,
    first_keys,
    delta,
    d_key,
    d_value,
    g_batch,
    g_head,
    g_row,
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
    One program per block of selected columns, key/value head and sequence, over the selected rows behind them and all
    heads of the group, so that nothing is added up across programs:

        dk_j = scale sum_i ds_ij q_i                dv_j = sum_i p_ij do_i
    """
    WIDE: tl.constexpr = lse.dtype.element_ty
    column = tl.program_id(0) * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    kv_head, kv_heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    batch = tl.program_id(2).to(tl.int64)
    p_rows = rows + batch * n_rows

    own = positions_of(p_rows, column, n_rows)
    p_segments = None if segments is None else segments + batch * n_keys
    own_document = segments_of(p_segments, own, own >= 0, -1)
    p_first = None if first_keys is None else first_keys + batch * n_rows
    real = own >= 0 if segments is None else own_document >= 0
    k = load_tile(key + batch * k_batch + kv_head * k_head, k_row, own.to(tl.int64), real, DIM, BLOCK_DIM)
    v = load_tile(value + batch * v_batch + kv_head * v_head, v_row, own.to(tl.int64), real, VALUE_DIM, BLOCK_VALUE)
    # an empty slot is seen by nobody, nor is padding
    own = tl.where(real, own, NEVER)

    dk = tl.zeros([BLOCK_KEYS, BLOCK_DIM], WIDE)
    dv = tl.zeros([BLOCK_KEYS, BLOCK_VALUE], WIDE)
    offset = tl.arange(0, BLOCK_ROWS)
    # rows ascend: those in front of the columns' own see none of them, those behind see all, but for the window and
    # documents
    begin = tl.program_id(0) * BLOCK_KEYS // BLOCK_ROWS * BLOCK_ROWS
    limit = NEVER if window is None else tl.max(tl.where(real, own, 0)) + window
    end = slots_before(p_rows, n_rows, limit, 1024)
    whole_begin = end
    if segments is None and window is None:
        whole_begin = tl.minimum(tl.cdiv((tl.program_id(0) + 1) * BLOCK_KEYS, BLOCK_ROWS) * BLOCK_ROWS, end)
    for MARGIN in tl.static_range(2):
        lower, upper = begin if MARGIN else whole_begin, whole_begin if MARGIN else end
        blocks = tl.cdiv(tl.maximum(upper - lower, 0), BLOCK_ROWS)
        for step in range(0, group * blocks):
            head = kv_head * group + step // blocks
            first = lower + step % blocks * BLOCK_ROWS
            slot = first + offset
            exists, far_first = slot < n_rows, first.to(tl.int64)
            p_query = query + batch * q_batch + head * q_head + far_first * q_row
            q = load_tile(p_query, q_row, offset, exists, DIM, BLOCK_DIM)
            p_grad = grad + batch * g_batch + head * g_head + far_first * g_row
            g = load_tile(p_grad, g_row, offset, exists, VALUE_DIM, BLOCK_VALUE)
            # +inf, so that p is 0, where a row sees nothing, an empty slot's included
            vector = (batch * kv_heads * group + head) * n_rows + slot
            row_lse = tl.load(lse + vector, mask=exists, other=float("inf")) * LOG2E
            row_delta = tl.load(delta + vector, mask=exists, other=0.0)
            products = tl.dot(k, tl.trans(q), input_precision=PRECISION, out_dtype=WIDE)
            scores = softcapped(products, SCALE, SOFTCAP)
            p = tl.exp2(scores - row_lse[None, :])
            if MARGIN:
                position = positions_of(p_rows, slot, n_rows)
                document = segments_of(p_segments, position, position >= 0, -2)
                row_first = first_seen(p_first, slot, n_rows)
                seen = visible(
                    position, document, row_first, own, own_document, segments, first_keys, window, KEY_AXIS=0
                )
                p = tl.where(seen, p, 0.0)
            dv = tl.dot(p.to(g.dtype), g, dv, input_precision=PRECISION, out_dtype=WIDE)
            if SOFTCAP is not None:
                p *= softcap_slope(scores, SOFTCAP)
            dp = tl.dot(v, tl.trans(g), input_precision=PRECISION, out_dtype=WIDE)
            ds = p * (dp - row_delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION, out_dtype=WIDE)

    exists, far_column = column < n_rows, column.to(tl.int64)
    p_out = (batch * kv_heads + kv_head) * n_rows
    store_tile(d_key + p_out * DIM, DIM, far_column, exists, dk * (SCALE / LOG2E), DIM, BLOCK_DIM)
    store_tile(d_value + p_out * VALUE_DIM, VALUE_DIM, far_column, exists, dv, VALUE_DIM, BLOCK_VALUE)
