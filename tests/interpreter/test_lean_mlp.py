"""The Triton kernels of the lean MLP."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.kernels.lean_checks import assert_as_good_as, cast, results, saved_bytes
from tokenseek_kernels import activated_linear, gated_activation, gated_linear
from tokenseek_kernels.compilation import TARGETS
from tokenseek_kernels.lean_mlp import operators, triton

NAMES = ["silu", "gelu", "gelu_tanh", "relu", "relu2"]
OUT = 5


def make_inputs(width, device, shape=(2, 3), seed=0):
    """gate, up, weight, bias and an upstream gradient, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(device)

    tensors = 2 * normal(*shape, width), normal(*shape, width), normal(OUT, width), normal(OUT)
    return [tensor.requires_grad_() for tensor in tensors], normal(*shape, OUT)


def gated(activation, impl):
    return lambda gate, up, weight, bias: gated_linear(gate, up, weight, bias, activation, impl=impl)


def plain(activation, impl):
    return lambda hidden, weight, bias: activated_linear(hidden, weight, bias, activation, impl=impl)


def product(activation, impl):
    return lambda gate, up: gated_activation(gate, up, activation, impl=impl)


def check(function, activation, tensors, upstream):
    """Triton against the reference in the same dtype and in float64."""
    truth = results(function(activation, "reference"), cast(tensors, torch.float64), upstream.double())
    same = results(function(activation, "reference"), tensors, upstream)
    assert_as_good_as(results(function(activation, "triton"), tensors, upstream), same, truth)


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("width", [1, 7, 63, 100, 2000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_reference(dtype, width, activation, device):
    tensors, upstream = make_inputs(width, device)
    (gate, up, weight, bias), upstream = cast(tensors, dtype), upstream.to(dtype)
    check(gated, activation, [gate, up, weight, bias], upstream)
    check(plain, activation, [gate, weight, None], upstream)
    check(product, activation, [gate, up], upstream[..., :1].expand(gate.shape))
    check(product, activation, [gate, None], upstream[..., :1].expand(gate.shape))


@pytest.mark.parametrize("activation", NAMES)
def test_far_from_zero(activation, device):
    gate = torch.tensor([-1e4, -90.0, -20.0, -0.0, 0.0, 20.0, 90.0, 1e4], device=device)
    tensors = [gate.requires_grad_(), torch.linspace(-2, 3, 8, device=device).requires_grad_()]
    found, expected = (
        results(product(activation, impl), tensors, torch.ones(8, device=device)) for impl in ("triton", "torch")
    )
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("kept", [(1, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (1, 0, 0, 0), (0, 1, 1, 0)])
def test_only_what_needs_a_gradient_gets_one(kept, device):
    tensors, upstream = make_inputs(63, device)
    tensors = [t.detach().requires_grad_(bool(k)) for t, k in zip(tensors, kept, strict=True)]
    check(gated, "silu", cast(tensors, torch.float32), upstream)


@pytest.mark.parametrize("activation", NAMES)
def test_gradcheck(activation, device):
    (gate, up, weight, _), _ = make_inputs(3, device, (2,))
    torch.autograd.gradcheck(gated(activation, "triton"), (gate, up, weight.detach(), None))
    torch.autograd.gradcheck(plain(activation, "triton"), (gate, weight.detach(), None))
    torch.autograd.gradcheck(product(activation, "triton"), (gate, up))


@pytest.mark.parametrize("halves", ["chunk", "every other"])
def test_views_are_read_inside_of_their_bounds(halves, device):
    """gate and up inside of one tensor, NaN around them."""
    (gate, up, weight, bias), upstream = make_inputs(10, device, (4,))
    buffer = torch.full((6, 24), float("nan"), dtype=torch.float64, device=device)
    views = (buffer[1:5, 1:11], buffer[1:5, 12:22]) if halves == "chunk" else (buffer[1:5, :20:2], buffer[1:5, 1:20:2])
    for view, values in zip(views, (gate, up), strict=True):
        view.copy_(values.detach())
    before = buffer.clone()
    leaves = [view.requires_grad_() for view in views]
    # an upstream gradient whose rows lie in a wider matrix
    wide = torch.full((4, 14), float("nan"), dtype=torch.float64, device=device)
    for function, tensors, size in ((gated, (weight, bias), OUT), (product, (), 10)):
        wide[:, 2 : 2 + size] = upstream[:, :1] * torch.linspace(-1, 2, size, dtype=torch.float64, device=device)
        grad = wide[:, 2 : 2 + size]
        found = results(function("gelu", "triton"), [*leaves, *tensors], grad)
        expected = results(function("gelu", "reference"), [gate, up, *tensors], grad)
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(buffer, before, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("weight_is_frozen", [False, True])
def test_saved_bytes(weight_is_frozen, device):
    tensors, _ = make_inputs(100, device)
    gate, up, weight, bias = cast(tensors, torch.bfloat16)
    weight.requires_grad_(not weight_is_frozen)
    assert saved_bytes(lambda: gated("silu", "triton")(gate, up, weight, bias), weight) == 2 * 6 * 100 * 2
    assert saved_bytes(lambda: plain("silu", "triton")(gate, weight, bias), weight) == 6 * 100 * 2
    assert saved_bytes(lambda: product("silu", "triton")(gate, up)) == 2 * 6 * 100 * 2


def test_writes_into_nothing_it_was_given(device):
    tensors, upstream = make_inputs(20, device)
    given = [*tensors, upstream]
    before = [t.detach().clone() for t in given]
    for function, inputs, grad in (
        (gated, tensors, upstream),
        (plain, [tensors[0], *tensors[2:]], upstream),
        (product, tensors[:2], before[1]),
    ):
        output = function("silu", "triton")(*inputs)
        first = torch.autograd.grad(output, inputs, grad, retain_graph=True)
        second = torch.autograd.grad(output, inputs, grad)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, given, strict=True))
    assert torch.equal(before[1], tensors[1])


def test_opcheck(device):
    (gate, up, *_), _ = make_inputs(33, device)
    gate, up = (t.detach().bfloat16() for t in (gate, up))
    ops = torch.ops.tokenseek
    for other in (up, None):
        torch.library.opcheck(ops.gated_activation_forward, (gate, other, "silu"))
        for needs_product in (True, False):
            arguments = (torch.ones_like(gate), gate, other, "silu", needs_product)
            torch.library.opcheck(ops.gated_activation_backward_, arguments)
        torch.library.opcheck(ops.gated_activation_backward, (torch.ones_like(gate), gate, other, "gelu"))


def test_the_gradient_of_gate_is_written_over_the_upstream_one(device):
    (gate, up, *_), _ = make_inputs(33, device)
    gate, up, grad = gate.detach(), up.detach(), torch.ones_like(gate)
    expected = operators.backward(grad, gate, up, "gelu")
    grad_up, _ = operators.backward_in_place(grad, gate, up, "gelu", False)
    assert torch.equal(grad, expected[0]) and torch.equal(grad_up, expected[1])


def test_fake_tensors(device):
    with FakeTensorMode():
        gate, up = (torch.empty(4, 33, 100, device=device, requires_grad=True) for _ in range(2))
        weight = torch.empty(50, 100, device=device, requires_grad=True)
        for output in (
            gated("silu", "triton")(gate, up, weight, None),
            plain("gelu", "triton")(gate, weight, None),
            product("relu2", "triton")(gate, up),
        ):
            output.sum().backward()
        assert gate.grad.shape == up.grad.shape == (4, 33, 100) and weight.grad.shape == (50, 100)


def test_every_activation_is_compiled():
    for target in TARGETS.values():
        listed = {(c.kernel, c.constants["ACTIVATION"]) for c in triton.compilations(target)}
        assert listed == {(k, name) for k in (triton._forward_kernel, triton._backward_kernel) for name in NAMES}
