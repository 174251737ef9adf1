"""Kernels for the compile gate's tests: one that is fine, and one for each fixed rule that breaks it."""

import triton
import triton.language as tl

from tokenseek_kernels.compilation import Compilation, Target


@triton.jit
def _copy(p_x, p_out, n, SIZE: tl.constexpr):
    offsets = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(p_out + offsets, tl.load(p_x + offsets, mask=offsets < n), mask=offsets < n)


@triton.jit
def _normalize(p_x, p_out, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """Keeps a whole tile in registers, to read it again after each sum."""
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, SIZE)[None, :]
    tile = tl.load(p_x + rows * SIZE + columns)
    tile = tile / tl.sum(tile, 0)[None, :]
    tile = tile / tl.sum(tile, 1)[:, None]
    tl.store(p_out + rows * SIZE + columns, tile)


@triton.jit(do_not_specialize=["n"])
def _matmul(p_a, p_b, p_out, n, stride, SIZE: tl.constexpr):
    rows, columns, inner = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :], tl.arange(0, 64)
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for start in range(0, n, 64):
        a = tl.load(p_a + rows * stride + start + inner[None, :])
        b = tl.load(p_b + (start + inner[:, None]) * stride + columns)
        total = tl.dot(a, b, total)
    tl.store(p_out + rows * stride + columns, total)


def _matmul_of(name: str, size: int, num_warps: int, num_stages: int) -> Compilation:
    types = {"p_a": "*bf16", "p_b": "*bf16", "p_out": "*fp32", "n": "i32", "stride": "i32"}
    return Compilation(name, _matmul, types, {"SIZE": size}, num_warps, num_stages, matmul=True)


FINE = _matmul_of("toy fine", 64, 4, 3)
TOO_MUCH_SHARED = _matmul_of("toy shared", 128, 8, 8)
SPILLS = Compilation(
    "toy spills", _normalize, {"p_x": "*fp32", "p_out": "*fp32"}, {"ROWS": 64, "SIZE": 128}, 1, 1, matmul=False
)
NO_TENSOR_CORE = Compilation(
    "toy copy", _copy, {"p_x": "*bf16", "p_out": "*bf16", "n": "i32"}, {"SIZE": 256}, 4, 1, matmul=True
)
INCOMPLETE = Compilation(
    "toy incomplete", _copy, {"p_x": "*bf16", "p_out": "*bf16"}, {"SIZE": 256}, 4, 1, matmul=False
)


def compilations(target: Target) -> list[Compilation]:
    """What a `triton.py` of the package offers."""
    return [FINE, NO_TENSOR_CORE]
