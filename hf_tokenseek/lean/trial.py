"""A small copy of a module, run plainly and lean: whether both compute the same, and what each of them saves."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ..memory import SavedActivations

ROWS = 4
# largest error relative to the largest entry: some roundings in float32, two units in the last place in bfloat16
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6}


@dataclass(frozen=True)
class Trial:
    """
    Outcome of one comparison.

    Attributes:
        error (`float`): largest difference of output or gradient, relative to its largest entry.
        same (`bool`): whether that is rounding.
        before, after (`int`): bytes saved for backward a row, plainly and lean, the input included where it is kept.
    """

    error: float
    same: bool
    before: int
    after: int


def small_copy(module: nn.Module, parameters: dict[str, Tensor], children: dict[str, nn.Module]) -> nn.Module:
    """A copy of `module` with other parameters and child modules in place of its own, which are not touched."""
    copied = copy.copy(module)
    frozen = {name for name, p in module._parameters.items() if p is not None and not p.requires_grad}
    own = {name: nn.Parameter(value, requires_grad=name not in frozen) for name, value in parameters.items()}
    copied.__dict__["_parameters"] = {**module._parameters, **own}
    copied.__dict__["_modules"] = {**module._modules, **children}
    return copied


def compare(build: Callable[[], nn.Module], lean: Callable, width: int, dtype: torch.dtype) -> Trial:
    """
    Runs a module's own forward and `lean(module, x)` on the same random rows, forward and backward.

    Args:
        build (`Callable`): makes the small module on the CPU, in float32.
        lean (`Callable`): the candidate forward.
        width (`int`): the module's input width.
        dtype (`torch.dtype`): of input and parameters.
    """
    # a model may be attached while it is simulated with fake tensors; the trial computes real numbers
    with _disable_current_modes(), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = build().to(dtype)
        x = torch.randn(2 * ROWS, width).to(dtype)
        before, plainly = _run(module, type(module).forward, x)
        after, leanly = _run(module, lean, x)
        error = max(_relative(found, truth) for found, truth in zip(leanly, plainly, strict=True))
        # what does not grow with the rows, such as Gemma's 1 + weight, is no activation
        before, after = (
            before - _run(module, type(module).forward, x[:ROWS])[0],
            after - _run(module, lean, x[:ROWS])[0],
        )
    return Trial(error, error <= TOLERANCE[dtype], before // ROWS, after // ROWS)


def _run(module: nn.Module, forward: Callable, x: Tensor) -> tuple[int, list[Tensor]]:
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    with SavedActivations(module) as saved:
        output = forward(module, x)
    bytes_saved = saved.bytes
    upstream = torch.randn(output.shape).to(output.dtype)
    inputs = [x, *(p for p in module.parameters() if p.requires_grad)]
    return bytes_saved, [output.detach(), *torch.autograd.grad(output, inputs, upstream)]


def _relative(found: Tensor, truth: Tensor) -> float:
    if found.dtype != truth.dtype or found.shape != truth.shape:
        return float("inf")
    found, truth = found.double(), truth.double()
    return float((found - truth).abs().max() / truth.abs().max().clamp(min=1e-30))
