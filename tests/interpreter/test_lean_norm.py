"""The Triton kernels of the lean norms."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.kernels.lean_checks import assert_as_good_as, cast, results, saved_bytes
from tokenseek_kernels import layer_norm, rms_norm
from tokenseek_kernels.compilation import TARGETS
from tokenseek_kernels.lean_norm import operators, triton

EPS = 1e-6
NORMS = {
    "llama": lambda x, w, b, impl: rms_norm(x, w, EPS, impl=impl),
    "olmo2": lambda x, w, b, impl: rms_norm(x, w, EPS, cast_before_weight=False, impl=impl),
    "gemma": lambda x, w, b, impl: rms_norm(x, w, EPS, offset=1.0, cast_before_weight=False, impl=impl),
    "offset before the cast": lambda x, w, b, impl: rms_norm(x, w, EPS, offset=1.0, impl=impl),
    "layer": lambda x, w, b, impl: layer_norm(x, w, b, EPS, impl=impl),
}


def make_inputs(shape, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, upstream = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    weight, bias = torch.randn(2, shape[-1], generator=generator, dtype=torch.float64)
    x *= 10 ** torch.linspace(-3, 2, shape[0], dtype=torch.float64).view(-1, *[1] * (len(shape) - 1))
    return [t.to(device).requires_grad_() for t in (x, weight, bias)], upstream.to(device)


def check(name, tensors, upstream, dtype):
    """Triton in `dtype` against the reference in `dtype` and in float64."""
    norm = NORMS[name]
    tensors, upstream = cast(tensors, dtype), upstream.to(dtype)
    if name != "layer":
        tensors[2] = None
    truth, plain, found = (
        results(lambda *t, impl=impl: norm(*t, impl), inputs, upstream)
        for impl, inputs in (("reference", cast(tensors, torch.float64)), ("reference", tensors), ("triton", tensors))
    )
    assert_as_good_as(found, plain, truth)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("width", [2, 7, 63, 100, 128, 2000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_reference(dtype, width, name, device):
    tensors, upstream = make_inputs((3, 13, width), device)
    check(name, tensors, upstream, dtype)


@pytest.mark.parametrize("name", ["llama", "layer"])
@pytest.mark.parametrize("width", [4100, 8191, 8192])
def test_wide_rows_add_up_in_a_launch_of_their_own(width, name, device):
    tensors, upstream = make_inputs((3, width), device)
    check(name, tensors, upstream, torch.bfloat16)
    tensors[0].requires_grad_(False)
    check(name, tensors, upstream, torch.bfloat16)


def test_rows_that_are_too_wide_go_to_torch(device):
    (x, weight, bias), _ = make_inputs((2, 8193), device)
    with pytest.raises(ValueError, match="8192 features"):
        rms_norm(x, weight, EPS, impl="triton")
    assert torch.equal(layer_norm(x, weight, bias, EPS), layer_norm(x, weight, bias, EPS, impl="torch"))


@pytest.mark.parametrize("name", ["gemma", "layer"])
def test_more_tiles_than_programs(name, device, monkeypatch):
    monkeypatch.setattr(triton, "PROGRAMS", 3)
    tensors, upstream = make_inputs((150, 100), device)
    check(name, tensors, upstream, torch.float32)


@pytest.mark.parametrize("name", ["llama", "layer"])
@pytest.mark.parametrize(
    "kept", [(True, False, False), (False, True, True), (False, False, True), (False, True, False)]
)
def test_only_what_needs_a_gradient_gets_one(kept, name, device):
    tensors, upstream = make_inputs((7, 100), device)
    check(name, [t.detach().requires_grad_(k) for t, k in zip(tensors, kept, strict=True)], upstream, torch.float32)


@pytest.mark.parametrize("name", ["llama", "gemma", "layer"])
def test_without_weight_and_bias(name, device):
    (x, *_), upstream = make_inputs((7, 100), device)
    check(name, [x, None, None], upstream, torch.bfloat16)


@pytest.mark.parametrize("name", ["llama", "gemma"])
@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "float32")])
def test_mixed_dtypes(dtypes, name, device):
    (x, weight, _), upstream = make_inputs((7, 100), device)
    tensors = [*cast([x], getattr(torch, dtypes[0])), *cast([weight], getattr(torch, dtypes[1])), None]
    truth = results(lambda *t: NORMS[name](*t, "reference"), cast(tensors, torch.float64), upstream)
    plain, found = (
        results(lambda *t, impl=impl: NORMS[name](*t, impl), tensors, upstream) for impl in ("reference", "triton")
    )
    assert_as_good_as(found, plain, truth)


@pytest.mark.parametrize("name", ["llama", "layer"])
@pytest.mark.parametrize("expanded", [False, True])
def test_views_are_read_inside_of_their_bounds(expanded, name, device):
    """What lies between and around the rows of a view is NaN, and nothing of it shows."""
    (x, weight, bias), upstream = make_inputs((6, 10), device)
    buffer = torch.full((8, 30), float("nan"), dtype=torch.float64, device=device)
    buffer[1:7, 5:15] = x.detach()
    view = buffer[1:7, 5:15].requires_grad_()
    if expanded:
        upstream = torch.ones((), dtype=torch.float64, device=device).expand(6, 10)
    else:
        wide = torch.full((6, 20), float("nan"), dtype=torch.float64, device=device)
        wide[:, ::2] = upstream
        upstream = wide[:, ::2]
    bias = bias if name == "layer" else None
    found = results(lambda *t: NORMS[name](*t, "triton"), [view, weight, bias], upstream)
    expected = results(lambda *t: NORMS[name](*t, "reference"), [x, weight, bias], upstream)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert buffer.isnan().sum() == 8 * 30 - 60


@pytest.mark.parametrize("name", NORMS)
def test_gradcheck(name, device):
    tensors, _ = make_inputs((3, 5), device)
    tensors = tensors if name == "layer" else tensors[:2]
    torch.autograd.gradcheck(lambda x, w, b=None: NORMS[name](x, w, b, "triton"), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_bytes(dtype, device):
    (x, weight, bias), _ = make_inputs((18, 100), device)
    x, weight, bias = cast([x, weight, bias], dtype)
    assert saved_bytes(lambda: rms_norm(x, weight, EPS, impl="triton"), weight) == 18 * (100 * dtype.itemsize + 4)
    layer = saved_bytes(lambda: layer_norm(x, weight, bias, EPS, impl="triton"), weight, bias)
    assert layer == 18 * (100 * dtype.itemsize + 8)


def test_writes_into_nothing_it_was_given_and_is_deterministic(device):
    tensors, upstream = make_inputs((40, 100), device)
    before = [t.detach().clone() for t in (*tensors, upstream)]
    for name in ("gemma", "layer"):
        used = tensors if name == "layer" else tensors[:2]
        output = NORMS[name](*tensors, "triton")
        first = torch.autograd.grad(output, used, upstream, retain_graph=True)
        second = torch.autograd.grad(output, used, upstream)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, (*tensors, upstream), strict=True))


def test_opcheck(device):
    tensors, upstream = make_inputs((4, 9, 33), device)
    x, weight, bias = (t.detach().bfloat16() for t in tensors)
    ops = torch.ops.tokenseek
    torch.library.opcheck(ops.rms_norm_forward, (x, weight, EPS, 1.0, False, torch.bfloat16))
    torch.library.opcheck(ops.rms_norm_forward, (x, None, EPS, 0.0, True, torch.float32))
    torch.library.opcheck(ops.layer_norm_forward, (x, weight, bias, EPS))
    _, mean, rstd = operators.layer_norm_forward(x, weight, bias, EPS)
    for needs in ((True, True, True), (True, False, False), (False, False, True)):
        for center in (mean, None):
            torch.library.opcheck(ops.norm_backward, (upstream.bfloat16(), x, weight, center, rstd, 0.0, *needs))


def test_fake_tensors(device):
    with FakeTensorMode():
        x = torch.empty(4, 33, 100, dtype=torch.bfloat16, device=device, requires_grad=True)
        weight = torch.empty(100, device=device, requires_grad=True)
        for y in (rms_norm(x, weight, EPS, impl="triton"), layer_norm(x, weight, None, EPS, impl="triton")):
            assert y.shape == x.shape
            y.sum().backward()
        assert x.grad.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32


def test_every_tile_a_launch_takes_is_compiled():
    for target in TARGETS.values():
        listed = {
            (c.kernel, c.constants["ROWS"], c.constants["COLUMNS"], c.num_warps) for c in triton.compilations(target)
        }
        for width in range(1, 8193, 37):
            for kernel in (triton._forward_kernel, triton._backward_kernel):
                assert (kernel, *triton.tile(width, target)) in listed
