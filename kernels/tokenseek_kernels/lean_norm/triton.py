"""
Both norms in two kernels; a layer norm is the one that has means.

A program holds whole rows in registers: every row is read once, and its means need no second pass. Weight gradients
take two stages, each in a fixed order: a fixed number of programs add up their rows, then torch adds up the programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenseek_kernels.compilation import Compilation, Target, target_of
from tokenseek_kernels.lean_norm.function import WIDEST
from tokenseek_kernels.lean_norm.reference import compute_dtype
from tokenseek_kernels.rows import as_rows

# programs that each write one partial sum of the weight gradient: two on each multiprocessor of an H100
PROGRAMS = 256
# columns of a program that only adds up, and so needs no whole rows
SUMS_COLUMNS = 2048
# a narrower row, such as a head's, shares its program with others
TILE_ELEMENTS = 512
ELEMENTS_PER_THREAD = 8


def rms_norm_forward(
    x: Tensor, weight: Tensor | None, eps: float, offset: float, cast_before_weight: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`y` in `dtype`, and one over the root mean square of each row."""
    y, _, rstd = _launch_forward(x, weight, None, eps, offset, cast_before_weight, dtype, centered=False)
    return y, rstd


def layer_norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`y`, mean and one over the standard deviation of each row."""
    return _launch_forward(x, weight, bias, eps, 0.0, False, x.dtype, centered=True)


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    offset: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias, those that `needs` asks for; of a layer norm where there is a `mean`."""
    tensors, width = (as_rows(grad), as_rows(x), _dense(weight), mean, rstd), x.shape[-1]
    needs_x, needs_sums = needs[0], any(needs[1:])
    if not needs_sums or (needs_x and _fits_with_sums(width, mean is not None)):
        grad_x, *sums = _launch_backward(*tensors, offset, needs, width)
    else:
        only_x, only_sums = (needs_x, False, False), (False, *needs[1:])
        grad_x = _launch_backward(*tensors, offset, only_x, width)[0] if needs_x else None
        _, *sums = _launch_backward(*tensors, offset, only_sums, min(width, SUMS_COLUMNS))
    return grad_x if grad_x is None else grad_x.view(x.shape), *sums


def tile(width: int, target: Target) -> tuple[int, int, int]:
    """Rows and columns of a program's tile, and its warps."""
    columns = max(128, triton.next_power_of_2(width))
    rows = max(1, TILE_ELEMENTS // columns)
    warps = rows * columns // (ELEMENTS_PER_THREAD * target.warp_size)
    return rows, columns, max(4, min(warps, 1024 // target.warp_size))


def _launch_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    cast_before_weight: bool,
    dtype: torch.dtype,
    centered: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    rows, width = as_rows(x), x.shape[-1]
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    rstd = x.new_empty(len(rows), dtype=compute_dtype(x))
    mean = torch.empty_like(rstd) if centered else None
    tile_rows, tile_columns, warps = tile(width, target_of(x))
    _forward_kernel[(triton.cdiv(len(rows), tile_rows),)](
        p_x=rows,
        p_weight=_dense(weight),
        p_bias=_dense(bias),
        p_y=y,
        p_mean=mean,
        p_rstd=rstd,
        x_stride=rows.stride(0),
        n_rows=len(rows),
        width=width,
        EPS=eps,
        OFFSET=offset,
        CAST_BEFORE_WEIGHT=cast_before_weight,
        ROWS=tile_rows,
        COLUMNS=tile_columns,
        num_warps=warps,
    )
    return y, mean, rstd


def _fits_with_sums(width: int, centered: bool) -> bool:
    """Whether registers hold a row, its gradient and the sums; else x and grad are read a second time for the sums."""
    return width <= (4096 if centered else 8192)


def _launch_backward(
    grads: Tensor,
    rows: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    offset: float,
    needs: tuple[bool, bool, bool],
    columns: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    n_rows, width = rows.shape
    tile_rows, tile_columns, warps = tile(columns, target_of(rows))
    programs = triton.cdiv(n_rows, tile_rows)
    if needs[1] or needs[2]:
        programs = min(programs, PROGRAMS)
    grad_x = rows.new_empty(n_rows, width) if needs[0] else None
    sums = [rstd.new_empty(programs, width) if needed else None for needed in needs[1:]]
    _backward_kernel[(programs, triton.cdiv(width, tile_columns))](
        p_grad=grads,
        p_x=rows,
        p_weight=weight,
        p_mean=mean,
        p_rstd=rstd,
        p_grad_x=grad_x,
        p_grad_weight=sums[0],
        p_grad_bias=sums[1],
        grad_stride=grads.stride(0),
        x_stride=rows.stride(0),
        n_rows=n_rows,
        width=width,
        OFFSET=offset,
        ROWS=tile_rows,
        COLUMNS=tile_columns,
        num_warps=warps,
    )
    return grad_x, *(partial if partial is None else partial.sum(0) for partial in sums)


def _dense(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()


@triton.jit
def _tile_of(index, n_rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows and columns of a tile, and which of them exist."""
    rows = (index * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exists = rows < n_rows
    inside = (columns < width)[None, :]
    if ROWS > 1:
        inside &= exists[:, None]
    return rows, columns, exists, inside


@triton.jit
def weighted(
    normed,
    p_weight,
    columns,
    inside,
    OFFSET: tl.constexpr,
    DTYPE: tl.constexpr,
    CAST_BEFORE_WEIGHT: tl.constexpr,
):
    """normed (offset + weight), rounded where the models' classes round; `DTYPE` is that of their input."""
    if CAST_BEFORE_WEIGHT:
        normed = normed.to(DTYPE).to(normed.dtype)
    if p_weight is not None:
        scale = tl.load(p_weight + columns, mask=inside, other=0.0).to(normed.dtype)
        if OFFSET != 0:
            scale += OFFSET
        if CAST_BEFORE_WEIGHT:
            scale = scale.to(p_weight.dtype.element_ty).to(normed.dtype)
        normed *= scale
    return normed


@triton.jit(do_not_specialize=["n_rows"])
def _forward_kernel(
    p_x,
    p_weight,
    p_bias,
    p_y,
    p_mean,
    p_rstd,
    x_stride,
    n_rows,
    width,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    CAST_BEFORE_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """
    y = (x - mean) rstd (offset + weight) + bias,   rstd = 1 / sqrt(mean square of (x - mean) + eps)
    """
    ACC: tl.constexpr = p_rstd.dtype.element_ty
    rows, columns, exists, inside = _tile_of(tl.program_id(0), n_rows, width, ROWS, COLUMNS)
    states = tl.load(p_x + rows[:, None] * x_stride + columns[None, :], mask=inside, other=0.0).to(ACC)
    if p_mean is not None:
        mean = tl.sum(states, 1) / width
        tl.store(p_mean + rows, mean, mask=exists)
        states = tl.where(inside, states - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(states * states, 1) / width + EPS)
    tl.store(p_rstd + rows, rstd, mask=exists)

    y = states * rstd[:, None]
    y = weighted(
        y, p_weight, columns[None, :], (columns < width)[None, :], OFFSET, p_x.dtype.element_ty, CAST_BEFORE_WEIGHT
    )
    if p_bias is not None:
        y += tl.load(p_bias + columns, mask=columns < width, other=0.0).to(ACC)[None, :]
    tl.store(p_y + rows[:, None] * width + columns[None, :], y.to(p_y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n_rows"])
def _backward_kernel(
    p_grad,
    p_x,
    p_weight,
    p_mean,
    p_rstd,
    p_grad_x,
    p_grad_weight,
    p_grad_bias,
    grad_stride,
    x_stride,
    n_rows,
    width,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """
    n = (x - mean) rstd,   g = grad (offset + weight)

    grad_x      = rstd (g - n mean(g n) - mean(g))     the last term only where there is a mean
    grad_weight = sum of grad n over rows,   grad_bias = sum of grad over rows
    """
    ACC: tl.constexpr = p_rstd.dtype.element_ty
    program = tl.program_id(0)
    if p_grad_weight is not None:
        grad_weight = tl.zeros((ROWS, COLUMNS), ACC)
    if p_grad_bias is not None:
        grad_bias = tl.zeros((ROWS, COLUMNS), ACC)
    for index in range(program, tl.cdiv(n_rows, ROWS), tl.num_programs(0)):
        rows, columns, exists, inside = _tile_of(index, n_rows, width, ROWS, COLUMNS)
        grad = tl.load(p_grad + rows[:, None] * grad_stride + columns[None, :], mask=inside, other=0.0).to(ACC)
        normed = tl.load(p_x + rows[:, None] * x_stride + columns[None, :], mask=inside, other=0.0).to(ACC)
        rstd = tl.load(p_rstd + rows, mask=exists, other=0.0)[:, None]
        if p_mean is not None:
            normed -= tl.load(p_mean + rows, mask=exists, other=0.0)[:, None]
        normed *= rstd
        if p_grad_weight is not None:
            grad_weight += grad * normed
        if p_grad_bias is not None:
            grad_bias += grad
        if p_grad_x is not None:
            if p_weight is not None:
                # read again for every tile: it stays in the cache, and would take registers
                grad *= (tl.load(p_weight + columns, mask=columns < width, other=0.0).to(ACC) + OFFSET)[None, :]
            grad_x = grad - normed * (tl.sum(grad * normed, 1) / width)[:, None]
            if p_mean is not None:
                grad_x -= (tl.sum(grad, 1) / width)[:, None]
            grad_x = (grad_x * rstd).to(p_grad_x.dtype.element_ty)
            tl.store(p_grad_x + rows[:, None] * width + columns[None, :], grad_x, mask=inside)

    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    partial = program.to(tl.int64) * width + columns
    if p_grad_weight is not None:
        tl.store(p_grad_weight + partial, tl.sum(grad_weight, 0), mask=columns < width)
    if p_grad_bias is not None:
        tl.store(p_grad_bias + partial, tl.sum(grad_bias, 0), mask=columns < width)


def compilations(target: Target) -> list[Compilation]:
    """Every tile of both norms in bf16, with and without weight gradients; the widest in float32 as well."""
    widths = [128 * 2**power for power in range(7)]
    found = []
    for centered in (False, True):
        for width, dtype in [*((width, "bf16") for width in widths), (WIDEST, "fp32")]:
            found.append(_forward_compilation(width, dtype, centered, target))
            found.append(_backward_compilation(width, dtype, centered, target, states=True, sums=False))
            if _fits_with_sums(width, centered):
                found.append(_backward_compilation(width, dtype, centered, target, states=True, sums=True))
            if width <= SUMS_COLUMNS:
                found.append(_backward_compilation(width, dtype, centered, target, states=False, sums=True))
    return found


def _forward_compilation(width: int, dtype: str, centered: bool, target: Target) -> Compilation:
    states = ("p_x", "p_weight", "p_y", *(("p_bias",) if centered else ()))
    types = dict.fromkeys(states, f"*{dtype}") | {"p_rstd": "*fp32"}
    types |= {"p_mean": "*fp32"} if centered else {}
    types |= dict.fromkeys(("x_stride", "n_rows", "width"), "i32")
    constants = {"EPS": 1e-6, "CAST_BEFORE_WEIGHT": not centered}
    return _compilation("forward", _forward_kernel, types, constants, width, dtype, centered, target)


def _backward_compilation(
    width: int, dtype: str, centered: bool, target: Target, states: bool, sums: bool
) -> Compilation:
    types = dict.fromkeys(("p_grad", "p_x", "p_weight"), f"*{dtype}") | {"p_rstd": "*fp32"}
    types |= dict.fromkeys(("grad_stride", "x_stride", "n_rows", "width"), "i32")
    types |= {"p_grad_x": f"*{dtype}"} if states else {}
    optional = {"p_mean": centered, "p_grad_weight": sums, "p_grad_bias": centered and sums}
    types |= {name: "*fp32" for name, present in optional.items() if present}
    what = {(True, False): "backward of x", (True, True): "backward", (False, True): "backward of weights"}
    return _compilation(what[states, sums], _backward_kernel, types, {}, width, dtype, centered, target)


def _compilation(
    what: str, kernel, types: dict, constants: dict, width: int, dtype: str, centered: bool, target: Target
) -> Compilation:
    rows, columns, warps = tile(width, target)
    absent = [name for name in kernel.arg_names if name.startswith("p_") and name not in types]
    constants = {"OFFSET": 0.0, "ROWS": rows, "COLUMNS": columns, **constants, **dict.fromkeys(absent)}
    name = f"{'layer' if centered else 'rms'}_norm {what} {dtype} width {width}"
    return Compilation(name, kernel, types, constants, warps, 3, matmul=False)
