"""Triton implementation: a program moves a block of rows by a block of features; no index tensor, no mask."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compilation import Compilation, Target, target_of
from ..triton_scores import positions_of

# elements that a program moves, the features of a row among them, and its threads
TILE, NARROWEST, WIDEST = 2048, 128, 1024
THREADS = 128


@triton.jit
def _places(rows, batch, n_rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Slots, their positions (-1 for empty ones) and columns of this program, the first two [ROWS, 1]."""
    slot = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    position = positions_of(rows + batch * n_rows, slot, n_rows).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    return slot.to(tl.int64)[:, None], position[:, None], column[None, :]


@triton.jit(do_not_specialize=["n_rows"])
def gather_kernel(
    states,
    kept,
    rows,
    s_batch,
    s_row,
    s_column,
    n_rows,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program per block of slots, block of features and sequence; empty slots read nothing and become zeros."""
    batch = tl.program_id(2).to(tl.int64)
    slot, position, column = _places(rows, batch, n_rows, width, ROWS, COLUMNS)
    inside = column < width
    p_states = states + batch * s_batch + position * s_row + column * s_column
    values = tl.load(p_states, mask=(position >= 0) & inside, other=0.0)
    tl.store(kept + (batch * n_rows + slot) * width + column, values, mask=(slot < n_rows) & inside)


@triton.jit(do_not_specialize=["n_rows"])
def write_kernel(
    states,
    fresh,
    rows,
    s_batch,
    s_row,
    s_column,
    f_batch,
    f_row,
    f_column,
    n_rows,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program per block of slots, block of features and sequence; empty slots neither read nor write."""
    batch = tl.program_id(2).to(tl.int64)
    slot, position, column = _places(rows, batch, n_rows, width, ROWS, COLUMNS)
    inside = (position >= 0) & (column < width)
    values = tl.load(fresh + batch * f_batch + slot * f_row + column * f_column, mask=inside, other=0.0)
    tl.store(states + batch * s_batch + position * s_row + column * s_column, values, mask=inside)


def gather_rows(states: Tensor, rows: Tensor) -> Tensor:
    """As the function of this name in `eager.py`."""
    kept = states.new_empty(*rows.shape, states.shape[-1])
    _launch(gather_kernel, states, rows, kept=kept)
    return kept


def write_rows_(states: Tensor, fresh: Tensor, rows: Tensor) -> None:
    """As the function of this name in `eager.py`."""
    _launch(write_kernel, states, rows, fresh=fresh, **_strides("f", fresh))


def _launch(kernel, states: Tensor, rows: Tensor, **others) -> None:
    (batch, n_rows), width = rows.shape, states.shape[-1]
    tile_rows, columns = tile(width)
    with torch.cuda.device_of(states):
        kernel[triton.cdiv(n_rows, tile_rows), triton.cdiv(width, columns), batch](
            states=states,
            rows=rows.contiguous(),
            **_strides("s", states),
            **others,
            n_rows=n_rows,
            width=width,
            ROWS=tile_rows,
            COLUMNS=columns,
            num_warps=THREADS // target_of(states).warp_size,
        )


def tile(width: int) -> tuple[int, int]:
    """Rows and features of a program."""
    columns = min(max(NARROWEST, triton.next_power_of_2(width)), WIDEST)
    return TILE // columns, columns


def _strides(prefix: str, states: Tensor) -> dict[str, int]:
    return dict(zip((f"{prefix}_batch", f"{prefix}_row", f"{prefix}_column"), states.stride(), strict=True))


def compilations(target: Target) -> list[Compilation]:
    """Both kernels with every tile in bf16, and with the widest in float32."""
    widths = [NARROWEST * 2**power for power in range((WIDEST // NARROWEST).bit_length())]
    return [
        _compilation(name, kernel, width, dtype, target)
        for name, kernel in (("gather", gather_kernel), ("write", write_kernel))
        for width, dtype in [*((width, "bf16") for width in widths), (WIDEST, "fp32")]
    ]


def _compilation(name: str, kernel, width: int, dtype: str, target: Target) -> Compilation:
    rows, columns = tile(width)
    constants = {"ROWS": rows, "COLUMNS": columns, "s_column": 1, "f_column": 1}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(("states", "kept", "fresh"), f"*{dtype}")
    types |= {"rows": "*i64"}
    types = {name: kind for name, kind in types.items() if name in kernel.arg_names and name not in constants}
    warps = THREADS // target.warp_size
    return Compilation(f"token_rows {name} {dtype} width {width}", kernel, types, constants, warps, 3, matmul=False)
