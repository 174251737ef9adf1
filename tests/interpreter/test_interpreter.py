"""What the other files here rely on: bfloat16 arithmetic is that of a GPU, and empty memory is poisoned."""

import pytest
import torch
import triton
import triton.language as tl

SIZE = 1024
ULP = 2.0**-8  # largest relative distance of neighbouring bfloat16 values


@triton.jit
def _elementwise(p_x, p_y, p_out, OPERATION: tl.constexpr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    x, y = tl.load(p_x + offsets), tl.load(p_y + offsets)
    if OPERATION == "add":
        out = x + y
    elif OPERATION == "sub":
        out = x - y
    elif OPERATION == "mul":
        out = x * y
    elif OPERATION == "neg":
        out = -x
    elif OPERATION == "maximum":
        out = tl.maximum(x, y)
    elif OPERATION == "where":
        out = tl.where(x > y, x, y)
    elif OPERATION == "times a number":
        out = x * 0.1
    tl.store(p_out + offsets, out)


@triton.jit
def _cast(p_x, p_out, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    tl.store(p_out + offsets, tl.load(p_x + offsets).to(p_out.dtype.element_ty))


@triton.jit
def _unary(p_x, p_out, OPERATION: tl.constexpr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    x = tl.load(p_x + offsets)
    if OPERATION == "exp":
        x = tl.exp(x.to(tl.float32))
    elif OPERATION == "log":
        x = tl.log(x.to(tl.float32))
    elif OPERATION == "rsqrt":
        x = tl.rsqrt(x.to(tl.float32))
    tl.store(p_out + offsets, x.to(tl.bfloat16))


@triton.jit
def _dot(p_a, p_b, p_out, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    square = offsets[:, None] * SIZE + offsets[None, :]
    tl.store(p_out + square, tl.dot(tl.load(p_a + square), tl.load(p_b + square)))


@triton.jit
def _row_sums(p_x, p_sum, p_max, ROWS: tl.constexpr, SIZE: tl.constexpr):
    rows = tl.arange(0, ROWS)
    x = tl.load(p_x + rows[:, None] * SIZE + tl.arange(0, SIZE)[None, :])
    tl.store(p_sum + rows, tl.sum(x, 1))
    tl.store(p_max + rows, tl.max(x, 1).to(tl.bfloat16))


def bf16(device, *shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(torch.bfloat16).to(device)


TORCH = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "neg": lambda x, y: -x,
    "maximum": torch.maximum,
    "where": torch.maximum,
    # a number takes the tensor's dtype, as on a GPU
    "times a number": lambda x, y: x * torch.tensor(0.1, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("operation", TORCH)
def test_elementwise_equals_torch_bit_for_bit(device, operation):
    x, y = bf16(device, SIZE), bf16(device, SIZE, seed=1, scale=30.0)
    out = torch.empty_like(x)
    _elementwise[(1,)](x, y, out, OPERATION=operation, SIZE=SIZE)
    assert torch.equal(out, TORCH[operation](x, y))


def test_casts_round_to_nearest_even(device):
    tie_below, tie_above = 1 + 2.0**-8, 1 + 3 * 2.0**-8  # half way between two neighbours
    special = torch.tensor([tie_below, tie_above, -tie_below, 3.4e38, float("inf"), float("nan"), -0.0, 1e-40])
    x = torch.cat((special, torch.randn(SIZE - len(special), generator=torch.Generator().manual_seed(0)))).to(device)
    out = torch.empty(SIZE, dtype=torch.bfloat16, device=device)
    _cast[(1,)](x, out, SIZE=SIZE)
    torch.testing.assert_close(out, x.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)
    assert out[:3].tolist() == [1.0, 1 + 2.0**-6, -1.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.int32])
def test_casts_from_bfloat16_keep_the_value(device, dtype):
    x = bf16(device, SIZE, scale=100.0)
    out = torch.empty(SIZE, dtype=dtype, device=device)
    _cast[(1,)](x, out, SIZE=SIZE)
    assert torch.equal(out, x.to(dtype))


@pytest.mark.parametrize("operation", ["exp", "log", "rsqrt"])
def test_functions_are_those_of_float32_rounded_once(device, operation):
    x = bf16(device, SIZE).abs() + 0.5
    out = torch.empty_like(x)
    _unary[(1,)](x, out, OPERATION=operation, SIZE=SIZE)
    torch.testing.assert_close(out.double(), getattr(torch, operation)(x.double()), rtol=ULP, atol=1e-6)


def test_dot_accumulates_in_float32(device):
    a, b = bf16(device, 64, 64), bf16(device, 64, 64, seed=1)
    out = torch.empty(64, 64, dtype=torch.float32, device=device)
    _dot[(1,)](a, b, out, SIZE=64)
    # products of bfloat16 values are exact in float32, so only the order of the sum differs
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=0, atol=1e-5 * 64)


def test_reductions(device):
    x = bf16(device, 16, 64)
    sums, largest = (torch.empty(16, dtype=torch.bfloat16, device=device) for _ in range(2))
    _row_sums[(1,)](x, sums, largest, ROWS=16, SIZE=64)
    assert torch.equal(largest, x.amax(1))
    # a GPU rounds after each of the log2(64) levels of the sum
    bound = 6 * ULP * x.double().abs().sum(1)
    assert bool(((sums.double() - x.double().sum(1)).abs() <= bound).all())


def test_empty_memory_of_the_kernels_is_poisoned(device):
    inside = {"__name__": "tokenseek_kernels.some.triton", "torch": torch, "device": device}
    exec(
        "floats = torch.empty(3, device=device); like = torch.empty_like(floats); new = floats.new_empty(2)\n"
        "whole = torch.empty(3, dtype=torch.int64, device=device)",
        inside,
    )
    assert all(inside[name].isnan().all() for name in ("floats", "like", "new"))
    assert (inside["whole"] == torch.iinfo(torch.int64).max).all()
