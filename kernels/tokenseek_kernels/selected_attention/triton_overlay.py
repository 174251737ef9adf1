"""Triton kernel that writes the fresh rows of selected keys or values over the scouted ones: one launch, no index."""

import triton
import triton.language as tl

from ..triton_scores import positions_of


@triton.jit(do_not_specialize=["n_rows"])
def overlay_kernel(
    states,
    fresh,
    rows,
    s_batch,
    s_head,
    s_row,
    s_column,
    f_batch,
    f_head,
    f_row,
    f_column,
    n_rows,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """One program per block of selected rows, key/value head and sequence; empty slots write nothing."""
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    slot = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    position = positions_of(rows + batch * n_rows, slot, n_rows).to(tl.int64)
    column = tl.arange(0, BLOCK_DIM)[None, :]
    inside = (position >= 0)[:, None] & (column < DIM)
    p_fresh = fresh + batch * f_batch + head * f_head + slot.to(tl.int64)[:, None] * f_row + column * f_column
    p_states = states + batch * s_batch + head * s_head + position[:, None] * s_row + column * s_column
    tl.store(p_states, tl.load(p_fresh, mask=inside, other=0.0).to(states.dtype.element_ty), mask=inside)
