"""
Three kernels with one end: what is to be compressed is read, normalised, or computed from gate and up, and is
compressed while it is in registers.

A tile is groups x features of a sub-token, padded to powers of two: a sub-token's sum stays within a row of the tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenseek_kernels.compilation import Compilation, Target, target_of
from tokenseek_kernels.lean_mlp.activations import TORCH
from tokenseek_kernels.lean_mlp.triton import gated_product
from tokenseek_kernels.lean_norm.reference import compute_dtype
from tokenseek_kernels.lean_norm.triton import ELEMENTS_PER_THREAD, weighted
from tokenseek_kernels.rows import as_rows
from tokenseek_kernels.velora_linear.function import WIDEST

# of a program that needs no whole row, and of one that does, at least
TILE_ELEMENTS, ROW_ELEMENTS = 1024, 2048
# features of a tile; shorter sub-tokens are padded to it
NARROWEST = 16


def compress(x: Tensor, directions: Tensor, size: int) -> Tensor:
    """`(..., width)` -> `(..., groups * rank)`, in the dtype of x."""
    rows, width, directions = as_rows(x), x.shape[-1], directions.contiguous()
    z = empty_compressed(x, directions, size, x.dtype)
    features, groups, warps = tile(size, target_of(x))
    _compress_kernel[(len(rows), triton.cdiv(width, size * groups))](
        p_x=rows,
        p_directions=directions,
        p_z=z,
        x_stride=rows.stride(0),
        width=width,
        size=size,
        n_groups=triton.cdiv(width, size),
        RANK=len(directions),
        GROUPS=groups,
        FEATURES=features,
        num_warps=warps,
    )
    return z


def rms_norm_compress(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float,
    cast_before_weight: bool,
    dtype: torch.dtype,
    directions: Tensor,
    size: int,
    z_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """`y` in `dtype`, z from y as a layer in `z_dtype` reads it, and one over the root mean square of each row."""
    rows, width, directions = as_rows(x), x.shape[-1], directions.contiguous()
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    z = empty_compressed(x, directions, size, z_dtype)
    rstd = x.new_empty(len(rows), dtype=compute_dtype(x))
    features, groups, warps = row_tile(width, size, target_of(x))
    _rms_norm_compress_kernel[(len(rows),)](
        p_x=rows,
        p_weight=None if weight is None else weight.contiguous(),
        p_y=y,
        p_rstd=rstd,
        p_directions=directions,
        p_z=z,
        x_stride=rows.stride(0),
        width=width,
        size=size,
        n_groups=triton.cdiv(width, size),
        EPS=eps,
        OFFSET=offset,
        CAST_BEFORE_WEIGHT=cast_before_weight,
        RANK=len(directions),
        GROUPS=groups,
        FEATURES=features,
        num_warps=warps,
    )
    return y, z, rstd


def gated_activation_compress(
    gate: Tensor, up: Tensor | None, activation: str, directions: Tensor, size: int, z_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`act(gate) * up`, or `act(gate)`, and z from it as a layer in `z_dtype` reads it."""
    gates, ups, directions = as_rows(gate), None if up is None else as_rows(up), directions.contiguous()
    product = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    z = empty_compressed(gate, directions, size, z_dtype)
    rows, width = gates.shape
    features, groups, warps = tile(size, target_of(gate))
    _gated_activation_compress_kernel[(rows, triton.cdiv(width, size * groups))](
        p_gate=gates,
        p_up=ups,
        p_product=product,
        p_directions=directions,
        p_z=z,
        gate_stride=gates.stride(0),
        up_stride=0 if ups is None else ups.stride(0),
        width=width,
        size=size,
        n_groups=triton.cdiv(width, size),
        ACTIVATION=activation,
        RANK=len(directions),
        GROUPS=groups,
        FEATURES=features,
        num_warps=warps,
    )
    return product, z


def empty_compressed(x: Tensor, directions: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Where z of x goes."""
    rank, width = directions.shape
    return torch.empty(*x.shape[:-1], triton.cdiv(width, size) * rank, dtype=dtype, device=x.device)


def tile(size: int, target: Target) -> tuple[int, int, int]:
    """Features and groups of a tile with some sub-tokens of a row, and its warps."""
    features = _features(size)
    return _tile(features, max(TILE_ELEMENTS, features), target)


def row_tile(width: int, size: int, target: Target) -> tuple[int, int, int]:
    """Features and groups of a tile with a whole row, and its warps."""
    return _tile(_features(size), row_elements(width, size), target)


def row_elements(width: int, size: int) -> int:
    """Of the tile that holds a row; more than `WIDEST` have no registers."""
    return max(ROW_ELEMENTS, _features(size) * triton.next_power_of_2(triton.cdiv(width, size)))


def _features(size: int) -> int:
    return max(NARROWEST, triton.next_power_of_2(size))


def _tile(features: int, elements: int, target: Target) -> tuple[int, int, int]:
    warps = elements // (ELEMENTS_PER_THREAD * target.warp_size)
    return features, elements // features, max(4, min(warps, 1024 // target.warp_size))


@triton.jit
def _tile_of(first, width, size, GROUPS: tl.constexpr, FEATURES: tl.constexpr):
    """Groups of a tile, their columns, and which of those exist."""
    groups = first * GROUPS + tl.arange(0, GROUPS)
    features = tl.arange(0, FEATURES)
    columns = groups[:, None] * size + features[None, :]
    return groups, columns, (features < size)[None, :] & (columns < width)


@triton.jit
def _compress_tile(states, p_directions, p_z, row, groups, columns, inside, width, n_groups, RANK: tl.constexpr):
    """z[row, group, k] = sum over the group's columns of states direction[k]"""
    ACC: tl.constexpr = tl.float64 if states.dtype == tl.float64 else tl.float32
    # as a layer in that dtype reads them
    states = states.to(p_z.dtype.element_ty).to(ACC)
    for k in range(RANK):
        direction = tl.load(p_directions + k * width + columns, mask=inside, other=0.0).to(ACC)
        z = tl.sum(states * direction, 1).to(p_z.dtype.element_ty)
        tl.store(p_z + row * n_groups * RANK + (groups * RANK + k), z, mask=groups < n_groups)


@triton.jit
def _compress_kernel(
    p_x,
    p_directions,
    p_z,
    x_stride,
    width,
    size,
    n_groups,
    RANK: tl.constexpr,
    GROUPS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """z of some groups of a row"""
    row = tl.program_id(0).to(tl.int64)
    groups, columns, inside = _tile_of(tl.program_id(1), width, size, GROUPS, FEATURES)
    states = tl.load(p_x + row * x_stride + columns, mask=inside, other=0.0)
    _compress_tile(states, p_directions, p_z, row, groups, columns, inside, width, n_groups, RANK)


@triton.jit
def _rms_norm_compress_kernel(
    p_x,
    p_weight,
    p_y,
    p_rstd,
    p_directions,
    p_z,
    x_stride,
    width,
    size,
    n_groups,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    CAST_BEFORE_WEIGHT: tl.constexpr,
    RANK: tl.constexpr,
    GROUPS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """
    y = x rstd (offset + weight),   rstd = 1 / sqrt(mean square of x + eps),   z of all groups of y
    """
    ACC: tl.constexpr = p_rstd.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    groups, columns, inside = _tile_of(0, width, size, GROUPS, FEATURES)
    states = tl.load(p_x + row * x_stride + columns, mask=inside, other=0.0).to(ACC)
    rstd = tl.rsqrt(tl.sum(states * states) / width + EPS)
    tl.store(p_rstd + row, rstd)
    y = weighted(states * rstd, p_weight, columns, inside, OFFSET, p_x.dtype.element_ty, CAST_BEFORE_WEIGHT)
    y = y.to(p_y.dtype.element_ty)
    tl.store(p_y + row * width + columns, y, mask=inside)
    _compress_tile(y, p_directions, p_z, row, groups, columns, inside, width, n_groups, RANK)


@triton.jit
def _gated_activation_compress_kernel(
    p_gate,
    p_up,
    p_product,
    p_directions,
    p_z,
    gate_stride,
    up_stride,
    width,
    size,
    n_groups,
    ACTIVATION: tl.constexpr,
    RANK: tl.constexpr,
    GROUPS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """product = act(gate) up,   z of some groups of it"""
    row = tl.program_id(0).to(tl.int64)
    groups, columns, inside = _tile_of(tl.program_id(1), width, size, GROUPS, FEATURES)
    product = gated_product(p_gate, p_up, row * gate_stride + columns, row * up_stride + columns, inside, ACTIVATION)
    tl.store(p_product + row * width + columns, product, mask=inside)
    _compress_tile(product, p_directions, p_z, row, groups, columns, inside, width, n_groups, RANK)


def compilations(target: Target) -> list[Compilation]:
    """Every tile in bf16, and every activation; at one size a second direction, and float32."""
    sizes = [NARROWEST * 2**power for power in range(10)]
    rows = [(size, width) for size in sizes for width in (2048, 4096, WIDEST) if size <= width]
    others = [(activation, gated) for activation in TORCH for gated in (True, False)]
    others.remove(("silu", True))
    return [
        *(_compress_compilation(size, "bf16", 1, target) for size in sizes),
        _compress_compilation(128, "bf16", 2, target),
        _compress_compilation(128, "fp32", 1, target),
        *(_rms_norm_compilation(size, width, "bf16", 1, target) for size, width in rows),
        _rms_norm_compilation(128, WIDEST, "bf16", 2, target),
        _rms_norm_compilation(128, WIDEST, "fp32", 1, target),
        *(_gated_compilation(size, "silu", True, "bf16", 1, target) for size in sizes),
        *(_gated_compilation(128, *other, "bf16", 1, target) for other in others),
        _gated_compilation(128, "silu", True, "bf16", 2, target),
        _gated_compilation(128, "gelu", True, "fp32", 1, target),
    ]


def _compress_compilation(size: int, dtype: str, rank: int, target: Target) -> Compilation:
    types = {"p_x": f"*{dtype}", "x_stride": "i32"}
    return _compilation("compress", _compress_kernel, types, {}, tile(size, target), dtype, rank)


def _rms_norm_compilation(size: int, width: int, dtype: str, rank: int, target: Target) -> Compilation:
    types = dict.fromkeys(("p_x", "p_weight", "p_y"), f"*{dtype}")
    types |= {"p_rstd": "*fp32", "x_stride": "i32"}
    name, constants = f"rms_norm_compress width {width}", {"EPS": 1e-6, "OFFSET": 0.0, "CAST_BEFORE_WEIGHT": True}
    tile = row_tile(width, size, target)
    return _compilation(name, _rms_norm_compress_kernel, types, constants, tile, dtype, rank)


def _gated_compilation(size: int, activation: str, gated: bool, dtype: str, rank: int, target: Target) -> Compilation:
    types = dict.fromkeys(("p_gate", "p_product", *(("p_up",) if gated else ())), f"*{dtype}")
    types |= dict.fromkeys(("gate_stride", "up_stride"), "i32")
    name = f"activation_compress {'gated' if gated else 'plain'} {activation}"
    constants = {"ACTIVATION": activation, **({} if gated else {"p_up": None})}
    return _compilation(name, _gated_activation_compress_kernel, types, constants, tile(size, target), dtype, rank)


def _compilation(
    name: str, kernel, types: dict, constants: dict, tile: tuple[int, int, int], dtype: str, rank: int
) -> Compilation:
    features, groups, warps = tile
    types = types | {"p_directions": "*fp32", "p_z": f"*{dtype}", "width": "i32", "size": "i32", "n_groups": "i32"}
    constants = {"RANK": rank, "GROUPS": groups, "FEATURES": features, **constants}
    return Compilation(f"{name} {dtype} size {features} rank {rank}", kernel, types, constants, warps, 3, matmul=False)
