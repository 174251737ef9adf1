"""Activations and their derivatives, in torch."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten

# the model configurations' names, and the name here; tanh-GELUs of many names differ in rounding only
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}


class Activation(NamedTuple):
    """
    Attributes:
        value (`Callable`): `value(x)` is a new tensor.
        chain (`Callable`): `chain(grad, x)` multiplies `grad` by the derivative at `x`, in place, and returns it.
    """

    value: Callable[[Tensor], Tensor]
    chain: Callable[[Tensor, Tensor], Tensor]


def _gelu(approximate: str) -> Activation:
    return Activation(
        lambda x: F.gelu(x, approximate=approximate),
        lambda grad, x: aten.gelu_backward.grad_input(grad, x, approximate=approximate, grad_input=grad),
    )


TORCH = {
    "silu": Activation(F.silu, lambda grad, x: aten.silu_backward.grad_input(grad, x, grad_input=grad)),
    "gelu": _gelu("none"),
    "gelu_tanh": _gelu("tanh"),
    "relu": Activation(torch.relu, lambda grad, x: aten.threshold_backward.grad_input(grad, x, 0, grad_input=grad)),
    "relu2": Activation(lambda x: torch.relu(x).square_(), lambda grad, x: grad.mul_(torch.relu(x).mul_(2))),
}
