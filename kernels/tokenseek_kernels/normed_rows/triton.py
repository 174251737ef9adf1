"""
The rows of `split_normed_rows` in Triton: each is read once in forward and written once in backward.

A program holds whole rows in registers, as the kernels of `lean_norm` do, whose tiles and sums these are.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compilation import Compilation, Target, target_of
from ..lean_norm.function import WIDEST
from ..lean_norm.reference import compute_dtype
from ..lean_norm.triton import PROGRAMS, tile, weighted


def gather_normed_rows(
    states: Tensor,
    rows: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float,
    cast_before_weight: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the function of this name in `eager.py`."""
    states, width = _dense_rows(states), states.shape[-1]
    kept = states.new_empty(*rows.shape, width)
    normed = torch.empty_like(kept, dtype=dtype)
    rstd = states.new_empty(rows.numel(), dtype=compute_dtype(states))
    tile_rows, columns, warps = tile(width, target_of(states))
    with torch.cuda.device_of(states):
        gather_kernel[(triton.cdiv(rows.numel(), tile_rows),)](
            p_states=states,
            p_rows=rows.contiguous(),
            p_weight=None if weight is None else weight.contiguous(),
            p_kept=kept,
            p_normed=normed,
            p_rstd=rstd,
            s_batch=states.stride(0),
            s_row=states.stride(1),
            n_slots=rows.numel(),
            n_rows=rows.shape[1],
            width=width,
            EPS=eps,
            OFFSET=offset,
            CAST_BEFORE_WEIGHT=cast_before_weight,
            ROWS=tile_rows,
            COLUMNS=columns,
            num_warps=warps,
        )
    return kept, normed, rstd


def write_normed_gradients_(
    grad: Tensor,
    grad_kept: Tensor,
    grad_normed: Tensor,
    kept: Tensor,
    rows: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    offset: float,
    needs_weight: bool,
) -> Tensor:
    """As the function of this name in `eager.py`; empty where nobody asks for the gradient of the weight."""
    width = kept.shape[-1]
    tile_rows, columns, warps = tile(width, target_of(grad))
    programs = triton.cdiv(rows.numel(), tile_rows)
    if needs_weight:
        programs = min(programs, PROGRAMS)
    sums = rstd.new_empty(programs, width) if needs_weight else None
    with torch.cuda.device_of(grad):
        write_kernel[(programs,)](
            p_grad=grad,
            p_grad_kept=grad_kept.contiguous(),
            p_grad_normed=grad_normed.contiguous(),
            p_kept=kept,
            p_rows=rows.contiguous(),
            p_weight=None if weight is None else weight.contiguous(),
            p_rstd=rstd,
            p_grad_weight=sums,
            s_batch=grad.stride(0),
            s_row=grad.stride(1),
            n_slots=rows.numel(),
            n_rows=rows.shape[1],
            width=width,
            OFFSET=offset,
            ROWS=tile_rows,
            COLUMNS=columns,
            num_warps=warps,
        )
    return sums.sum(0) if needs_weight else rstd.new_empty(0)


def _dense_rows(states: Tensor) -> Tensor:
    """The same where features lie side by side, else a copy."""
    return states if states.stride(-1) == 1 else states.contiguous()


@triton.jit
def _places(p_rows, index, n_slots, n_rows, s_batch, s_row, ROWS: tl.constexpr):
    """Slots of a tile, which of them exist, which have a row, and where those rows begin in the stream."""
    slot = (index * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    position = tl.load(p_rows + slot, mask=slot < n_slots, other=-1)
    return slot, slot < n_slots, position >= 0, (slot // n_rows) * s_batch + position * s_row


@triton.jit(do_not_specialize=["n_slots", "n_rows"])
def gather_kernel(
    p_states,
    p_rows,
    p_weight,
    p_kept,
    p_normed,
    p_rstd,
    s_batch,
    s_row,
    n_slots,
    n_rows,
    width,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    CAST_BEFORE_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """
    kept = states[rows],   normed = kept rstd (offset + weight),   rstd = 1 / sqrt(mean square of kept + eps)

    Empty slots read nothing and become zeros.
    """
    ACC: tl.constexpr = p_rstd.dtype.element_ty
    slot, exists, taken, start = _places(p_rows, tl.program_id(0), n_slots, n_rows, s_batch, s_row, ROWS)
    columns = tl.arange(0, COLUMNS)[None, :]
    inside = columns < width
    kept = tl.load(p_states + start[:, None] + columns, mask=taken[:, None] & inside, other=0.0)
    to = slot[:, None] * width + columns
    tl.store(p_kept + to, kept, mask=exists[:, None] & inside)
    states = kept.to(ACC)
    rstd = tl.rsqrt(tl.sum(states * states, 1) / width + EPS)
    tl.store(p_rstd + slot, rstd, mask=exists)
    normed = weighted(
        states * rstd[:, None], p_weight, columns, inside, OFFSET, p_states.dtype.element_ty, CAST_BEFORE_WEIGHT
    )
    tl.store(p_normed + to, normed.to(p_normed.dtype.element_ty), mask=exists[:, None] & inside)


@triton.jit(do_not_specialize=["n_slots", "n_rows"])
def write_kernel(
    p_grad,
    p_grad_kept,
    p_grad_normed,
    p_kept,
    p_rows,
    p_weight,
    p_rstd,
    p_grad_weight,
    s_batch,
    s_row,
    n_slots,
    n_rows,
    width,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """
    n = kept rstd,   g = grad_normed (offset + weight)

    grad[rows]  = grad_kept + rstd (g - n mean(g n))
    grad_weight = sum of grad_normed n over the rows

    Empty slots neither read nor write.
    """
    ACC: tl.constexpr = p_rstd.dtype.element_ty
    program = tl.program_id(0)
    columns = tl.arange(0, COLUMNS)[None, :]
    if p_grad_weight is not None:
        grad_weight = tl.zeros((ROWS, COLUMNS), ACC)
    for index in range(program, tl.cdiv(n_slots, ROWS), tl.num_programs(0)):
        slot, _, taken, start = _places(p_rows, index, n_slots, n_rows, s_batch, s_row, ROWS)
        inside = taken[:, None] & (columns < width)
        at = slot[:, None] * width + columns
        grad = tl.load(p_grad_normed + at, mask=inside, other=0.0).to(ACC)
        rstd = tl.load(p_rstd + slot, mask=taken, other=0.0)[:, None]
        normed = tl.load(p_kept + at, mask=inside, other=0.0).to(ACC) * rstd
        if p_grad_weight is not None:
            grad_weight += grad * normed
        if p_weight is not None:
            # read again for every tile: it stays in the cache, and would take registers
            grad *= tl.load(p_weight + columns, mask=columns < width, other=0.0).to(ACC) + OFFSET
        grad = (grad - normed * (tl.sum(grad * normed, 1) / width)[:, None]) * rstd
        grad += tl.load(p_grad_kept + at, mask=inside, other=0.0).to(ACC)
        tl.store(p_grad + start[:, None] + columns, grad.to(p_grad.dtype.element_ty), mask=inside)

    if p_grad_weight is not None:
        partial = tl.expand_dims(tl.sum(grad_weight, 0), 0)
        tl.store(p_grad_weight + program.to(tl.int64) * width + columns, partial, mask=columns < width)


def compilations(target: Target) -> list[Compilation]:
    """Every tile in bf16, with and without the gradient of the weight; the widest in float32 as well."""
    widths = [128 * 2**power for power in range(7)]
    return [
        _compilation(what, width, dtype, target)
        for width, dtype in [*((width, "bf16") for width in widths), (WIDEST, "fp32")]
        for what in ("gather", "write", "write, gradient of the weight")
    ]


def _compilation(what: str, width: int, dtype: str, target: Target) -> Compilation:
    kernel = gather_kernel if what == "gather" else write_kernel
    rows, columns, warps = tile(width, target)
    constants = {"OFFSET": 0.0, "ROWS": rows, "COLUMNS": columns}
    constants |= {"EPS": 1e-6, "CAST_BEFORE_WEIGHT": True} if what == "gather" else {}
    constants |= {"p_grad_weight": None} if what == "write" else {}
    types = {name: f"*{dtype}" if name.startswith("p_") else "i32" for name in kernel.arg_names}
    types |= {"p_rows": "*i64", "p_rstd": "*fp32", "p_grad_weight": "*fp32"}
    types = {name: types[name] for name in kernel.arg_names if name not in constants}
    return Compilation(f"normed_rows {what} {dtype} width {width}", kernel, types, constants, warps, 3, matmul=False)
