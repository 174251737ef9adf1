"""Triton implementation: the host functions, the blocks they launch, and what the compile gate builds."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..compilation import Compilation, Target, target_of
from ..scores import TRITON_HEAD_SIZES, wide_dtype
from .triton_backward import key_value_gradient_kernel, query_gradient_kernel
from .triton_forward import forward_kernel
from .triton_overlay import overlay_kernel


class Blocks(NamedTuple):
    """What one program works on, and how: query rows and keys a step, threads, stages of its pipeline."""

    rows: int
    keys: int
    threads: int
    stages: int


# By head size (rounded up) and bytes an element; first where a block may use more than ROOMY bytes of shared memory
# (Hopper, data-centre Blackwell: operands of the tensor cores live there), second elsewhere. The largest that do not
# spill registers.
Table = dict[tuple[int, int], tuple[Blocks, Blocks]]
ROOMY = 200_000
FORWARD: Table = {
    (64, 2): (Blocks(128, 64, 256, 3), Blocks(128, 64, 256, 3)),
    (128, 2): (Blocks(128, 64, 256, 3), Blocks(128, 32, 256, 3)),
    (256, 2): (Blocks(64, 32, 256, 2), Blocks(64, 32, 256, 2)),
    (64, 4): (Blocks(64, 32, 256, 2), Blocks(32, 32, 128, 2)),
    (32, 8): (Blocks(16, 16, 64, 1), Blocks(16, 16, 64, 1)),
}
QUERY_GRADIENT: Table = {
    (64, 2): (Blocks(128, 64, 256, 3), Blocks(128, 64, 256, 3)),
    (128, 2): (Blocks(64, 64, 256, 3), Blocks(128, 32, 256, 2)),
    (256, 2): (Blocks(32, 32, 256, 1), Blocks(32, 32, 256, 1)),
    (64, 4): (Blocks(64, 32, 256, 2), Blocks(32, 32, 128, 2)),
    (32, 8): (Blocks(16, 16, 64, 1), Blocks(16, 16, 64, 1)),
}
KEY_VALUE_GRADIENT: Table = {
    (64, 2): (Blocks(32, 128, 256, 2), Blocks(32, 128, 256, 2)),
    (128, 2): (Blocks(32, 64, 256, 2), Blocks(32, 64, 256, 2)),
    (256, 2): (Blocks(32, 32, 256, 1), Blocks(32, 32, 256, 1)),
    (64, 4): (Blocks(32, 32, 256, 1), Blocks(32, 32, 256, 1)),
    (32, 8): (Blocks(16, 16, 128, 1), Blocks(16, 16, 128, 1)),
}


# of a program that overlays rows
OVERLAY_ROWS, OVERLAY_THREADS = 16, 128


def padded(size: int) -> int:
    """A head size as blocks hold it: the next power of two, 16 at least, as the tensor cores want."""
    return max(16, triton.next_power_of_2(size))


def choose_blocks(table: Table, size: int, dtype: torch.dtype, target: Target) -> Blocks:
    """
    The blocks for heads of a size.

    Raises:
        ValueError: the heads are too large for the kernels.
    """
    limit = TRITON_HEAD_SIZES[dtype.itemsize]
    if size > limit:
        raise ValueError(f"The Triton kernels take heads of up to {limit} in {dtype}, got {size}. Use impl='torch'.")
    head = min(head for head, itemsize in table if itemsize == dtype.itemsize and size <= head)
    roomy, tight = table[head, dtype.itemsize]
    return roomy if target.shared_memory > ROOMY else tight


def key_value_blocks(size: int, dtype: torch.dtype, target: Target, first_keys: bool) -> Blocks:
    """The blocks of the gradients of keys and values; AMD's registers hold no second stage beside first keys."""
    blocks = choose_blocks(KEY_VALUE_GRADIENT, size, dtype, target)
    return blocks._replace(stages=1) if first_keys and target.backend == "hip" else blocks


def launch_options(blocks: Blocks, dtype: torch.dtype, target: Target) -> dict[str, Any]:
    """Keywords of a launch: the blocks, and three TF32 products for a float32 one where there are TF32 cores."""
    return {
        "BLOCK_ROWS": blocks.rows,
        "BLOCK_KEYS": blocks.keys,
        "PRECISION": "tf32x3" if dtype == torch.float32 and target.backend == "cuda" else "ieee",
        "num_warps": blocks.threads // target.warp_size,
        "num_stages": blocks.stages,
    }


def strides(prefix: str, states: Tensor) -> dict[str, int]:
    """Keywords of a launch: strides of `(batch, heads, rows, dim)`."""
    return dict(zip((f"{prefix}_batch", f"{prefix}_head", f"{prefix}_row"), states.stride(), strict=False))


def aligned(states: Tensor) -> Tensor:
    """
    What `load_tile` reads: numbers of a row lie side by side, and rows start at multiples of 16 bytes. The tensor
    itself where that holds, as it does for any usual head size, else a copy with room behind each row.
    """
    unit = 16 // states.element_size()
    steps = [step for step, size in zip(states.stride()[:-1], states.shape, strict=False) if size > 1]
    if states.stride(-1) == 1 and states.data_ptr() % 16 == 0 and not any(step % unit for step in steps):
        return states
    size = states.shape[-1]
    copy = states.new_empty(*states.shape[:-1], triton.cdiv(size, unit) * unit)[..., :size]
    return copy.copy_(states)


def rule(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    scale: float,
    softcap: float | None,
    window: int | None,
    first_keys: Tensor | None,
) -> dict[str, Any]:
    """Keywords of a launch: counts, options, first keys by slot; factors on scores in units of log2."""
    return {
        "n_rows": query.shape[2],
        "n_keys": key.shape[2],
        "group": query.shape[1] // key.shape[1],
        "SCALE": scale * math.log2(math.e),
        "SOFTCAP": None if softcap is None else softcap * math.log2(math.e),
        "window": window,
        # as narrow as it gets: it lives in registers
        "first_keys": None if first_keys is None else first_keys.gather(1, rows.clamp(min=0)).int(),
    }


def selected_attention_forward(query, key, value, rows, segments, scale, softcap, window, first_keys, sinks):
    """As the function of this name in `blocked.py`."""
    batch, heads, n_rows, _ = query.shape
    output = query.new_empty(batch, n_rows, heads, value.shape[-1])
    return output, _launch_forward(
        query, key, value, rows, segments, scale, softcap, window, first_keys, sinks, output
    )


def overlay_(states: Tensor, fresh: Tensor, rows: Tensor) -> None:
    """As the function of this name in `blocked.py`."""
    batch, heads, n_rows, dim = fresh.shape
    names = ("batch", "head", "row", "column")
    with torch.cuda.device_of(states):
        overlay_kernel[triton.cdiv(n_rows, OVERLAY_ROWS), heads, batch](
            states=states,
            fresh=fresh,
            rows=rows.contiguous(),
            **{f"s_{name}": step for name, step in zip(names, states.stride(), strict=True)},
            **{f"f_{name}": step for name, step in zip(names, fresh.stride(), strict=True)},
            n_rows=n_rows,
            DIM=dim,
            BLOCK_DIM=padded(dim),
            BLOCK_ROWS=OVERLAY_ROWS,
            num_warps=OVERLAY_THREADS // target_of(states).warp_size,
        )


def log_sum_exp(query, key, rows, segments, scale, softcap, window, first_keys, sinks) -> Tensor:
    """The log-sum-exp of [`selected_attention_forward`] alone, at half of its products."""
    return _launch_forward(query, key, None, rows, segments, scale, softcap, window, first_keys, sinks, None)


def _launch_forward(query, key, value, rows, segments, scale, softcap, window, first_keys, sinks, output) -> Tensor:
    batch, heads, n_rows, dim = query.shape
    query, key = aligned(query), aligned(key)
    # without values the kernel leaves out whatever concerns them
    value = None if value is None else aligned(value)
    value_dim = 1 if value is None else value.shape[-1]
    lse = query.new_empty(batch, heads, n_rows, dtype=wide_dtype(query))
    target = target_of(query)
    blocks = choose_blocks(FORWARD, max(dim, value_dim), query.dtype, target)
    with torch.cuda.device_of(query):
        forward_kernel[triton.cdiv(n_rows, blocks.rows), heads, batch](
            query=query,
            key=key,
            value=value,
            rows=rows.contiguous(),
            segments=None if segments is None else segments.contiguous(),
            sinks=None if sinks is None else sinks.contiguous(),
            output=output,
            lse=lse,
            **strides("q", query),
            **strides("k", key),
            **strides("v", key if value is None else value),
            **rule(query, key, rows, scale, softcap, window, first_keys),
            DIM=dim,
            VALUE_DIM=value_dim,
            BLOCK_DIM=padded(dim),
            BLOCK_VALUE=padded(value_dim),
            **launch_options(blocks, query.dtype, target),
        )
    return lse


def selected_attention_backward(
    grad, query, key, value, output, lse, rows, segments, scale, softcap, window, first_keys, sinks
):
    """As the function of this name in `blocked.py`. Two launches, no atomics: the same bits every time."""
    batch, heads, n_rows, dim = query.shape
    kv_heads, value_dim = key.shape[1], value.shape[-1]
    d_query = query.new_empty(batch, n_rows, heads, dim).transpose(1, 2)
    d_key = key.new_empty(batch, kv_heads, n_rows, dim)
    d_value = value.new_empty(batch, kv_heads, n_rows, value_dim)
    grad, output = aligned(grad), aligned(output)
    query, key, value = aligned(query), aligned(key), aligned(value)
    delta = torch.empty_like(lse)
    target = target_of(query)
    shared = {
        "grad": grad,
        "query": query,
        "key": key,
        "value": value,
        "lse": lse,
        "delta": delta,
        "rows": rows.contiguous(),
        "segments": None if segments is None else segments.contiguous(),
        **strides("g", grad.transpose(1, 2)),
        **strides("q", query),
        **strides("k", key),
        **strides("v", value),
        **rule(query, key, rows, scale, softcap, window, first_keys),
        "DIM": dim,
        "VALUE_DIM": value_dim,
        "BLOCK_DIM": padded(dim),
        "BLOCK_VALUE": padded(value_dim),
    }
    with torch.cuda.device_of(query):
        blocks = choose_blocks(QUERY_GRADIENT, max(dim, value_dim), query.dtype, target)
        query_gradient_kernel[triton.cdiv(n_rows, blocks.rows), heads, batch](
            **shared,
            output=output,
            d_query=d_query,
            **strides("o", output.transpose(1, 2)),
            **launch_options(blocks, query.dtype, target),
        )
        blocks = key_value_blocks(max(dim, value_dim), query.dtype, target, first_keys is not None)
        key_value_gradient_kernel[triton.cdiv(n_rows, blocks.keys), kv_heads, batch](
            **shared, d_key=d_key, d_value=d_value, **launch_options(blocks, query.dtype, target)
        )
    if sinks is None:
        return d_query, d_key, d_value, lse.new_empty(0)
    sink_share = (sinks.to(lse.dtype).view(1, -1, 1) - lse).exp()
    return d_query, d_key, d_value, -(sink_share * delta).sum((0, 2))


# What the gate compiles: every block of the tables, the dtypes, a head size that is no power of two, and one with
# smaller values (MLA); everything on, the window in tokens or by first keys, and everything off where only causality
# applies.
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
ABSENT = {
    "all options": ("first_keys",),
    "first keys": (),
    "plain": ("segments", "sinks", "SOFTCAP", "window", "first_keys"),
}
GATED = [
    *((torch.bfloat16, dim, dim, options) for dim in (64, 128, 256) for options in ABSENT),
    *((torch.float32, 64, 64, options) for options in ABSENT),
    (torch.bfloat16, 80, 80, "all options"),
    (torch.bfloat16, 192, 128, "all options"),
    (torch.float16, 128, 128, "all options"),
    (torch.float64, 32, 32, "all options"),
]


def compilations(target: Target) -> list[Compilation]:
    """Every kernel of this operation, with every configuration that a launch may choose on `target`."""
    return list(_compilations(target))


def _compilations(target: Target) -> Iterator[Compilation]:
    for dtype, dim, value_dim, options in GATED:
        size = f"dim {dim}" if dim == value_dim else f"dim {dim}/{value_dim}"
        largest = max(dim, value_dim), dtype, target
        kernels = {
            "forward": (forward_kernel, choose_blocks(FORWARD, *largest)),
            "query gradient": (query_gradient_kernel, choose_blocks(QUERY_GRADIENT, *largest)),
            "key value gradient": (
                key_value_gradient_kernel,
                key_value_blocks(*largest, first_keys="first_keys" not in ABSENT[options]),
            ),
        }
        for name, (kernel, blocks) in kernels.items():
            yield compilation(
                f"selected_attention {name} {DTYPES[dtype]} {size} {options}",
                kernel,
                blocks,
                dtype,
                target,
                ABSENT[options],
                DIM=dim,
                VALUE_DIM=value_dim,
                BLOCK_DIM=padded(dim),
                BLOCK_VALUE=padded(value_dim),
            )
    for dim in (64, 80, 128, 256):
        yield _overlay_compilation(dim, target)
    for dim in (64, 128, 256):
        yield compilation(
            f"selected_attention log-sum-exp bf16 dim {dim}",
            forward_kernel,
            choose_blocks(FORWARD, dim, torch.bfloat16, target),
            torch.bfloat16,
            target,
            ("value", "output", *ABSENT["plain"]),
            DIM=dim,
            VALUE_DIM=1,
            BLOCK_DIM=padded(dim),
            BLOCK_VALUE=padded(1),
        )


def _overlay_compilation(dim: int, target: Target) -> Compilation:
    constants = {"DIM": dim, "BLOCK_DIM": padded(dim), "BLOCK_ROWS": OVERLAY_ROWS, "s_column": 1, "f_column": 1}
    types = {"states": "*bf16", "fresh": "*bf16", "rows": "*i64"}
    types |= {name: "i32" for name in overlay_kernel.arg_names if name not in {*types, *constants}}
    warps = OVERLAY_THREADS // target.warp_size
    return Compilation(
        f"selected_attention overlay bf16 dim {dim}", overlay_kernel, types, constants, warps, 3, matmul=False
    )


def compilation(
    name: str, kernel, blocks: Blocks, dtype: torch.dtype, target: Target, absent: tuple[str, ...], **sizes: int
) -> Compilation:
    """One entry for the gate; the type of an argument follows from its name, `absent` ones are `None`."""
    options = launch_options(blocks, dtype, target)
    num_warps, num_stages = options.pop("num_warps"), options.pop("num_stages")
    constants = {
        "SCALE": 0.125,
        "SOFTCAP": 50.0,
        **sizes,
        **options,
        **{argument: None for argument in absent if argument in kernel.arg_names},
    }
    types = {argument: _type_of(argument, DTYPES[dtype]) for argument in kernel.arg_names if argument not in constants}
    return Compilation(name, kernel, types, constants, num_warps, num_stages, matmul=dtype != torch.float64)


def _type_of(argument: str, element: str) -> str:
    wide = "fp64" if element == "fp64" else "fp32"
    if argument == "first_keys":
        return "*i32"
    if argument in ("rows", "segments"):
        return "*i64"
    if argument in ("lse", "delta", "mass"):
        return f"*{wide}"
    if argument in ("n_rows", "n_keys", "group", "window") or argument.endswith(("_batch", "_head", "_row")):
        return "i32"
    return f"*{element}"
