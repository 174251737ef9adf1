"""`CustomOp`: an operator for whoever looks at operators, a plain call for everybody else."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tokenseek_kernels.custom_op import custom_op

calls = []


@custom_op("tokenseek_tests::double")
def double(x: Tensor) -> Tensor:
    """Twice `x`."""
    calls.append(type(x))
    return x + x


@double.register_fake
def _(x):
    return torch.empty_like(x)


class Watch(TorchDispatchMode):
    """Notes which operators run."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def profiled():
    """Whether `double` went through its operator, told by torch's profiler, which is no dispatch mode."""

    def run(call) -> bool:
        with torch.profiler.profile() as profile:
            call()
        return any("tokenseek_tests::double" in event.key for event in profile.key_averages())

    return run


def test_without_gradients_the_function_is_called_and_no_operator(profiled):
    x = torch.randn(3)
    with torch.no_grad():
        assert not profiled(lambda: double(x)) and torch.equal(double(x), 2 * x)
        assert not profiled(lambda: double(torch.nn.Parameter(x)))


def test_with_gradients_it_is_an_operator_that_refuses_its_derivative(profiled):
    x = torch.randn(3, requires_grad=True)
    assert profiled(lambda: double(x))
    with pytest.raises(RuntimeError, match="autograd"):
        double(x).sum().backward()


def test_whoever_looks_at_operators_sees_one():
    x = torch.randn(3)
    with torch.no_grad():
        with Watch() as watch:
            double(x)
        assert watch.seen == ["tokenseek_tests.double.default"]
        calls.clear()
        with FakeTensorMode() as mode:
            assert double(mode.from_tensor(x)).shape == (3,)
        # a fake tensor outside of its mode, too
        assert double(mode.from_tensor(x)).shape == (3,) and not calls
        assert torch.equal(torch.compile(double, backend="eager", fullgraph=True)(x), 2 * x)
    with pytest.raises(RuntimeError):
        torch.func.grad(lambda t: double(t).sum())(x)


def test_it_says_what_the_function_says():
    assert double.__doc__ == "Twice `x`." and double.function(torch.ones(1)) == 2
