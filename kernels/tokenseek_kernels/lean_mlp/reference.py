"""The formulas of README.md, written as the models write them. Autograd differentiates them."""

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "relu": torch.relu,
    "relu2": lambda x: torch.relu(x) ** 2,
}


def gated_activation(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    """`act(gate) * up`, or `act(gate)`; the activation is rounded to the dtype of `gate` before the product."""
    value = ACTIVATIONS[activation](gate.to(torch.promote_types(gate.dtype, torch.float32))).to(gate.dtype)
    return value if up is None else value * up


def gated_linear(
    gate: Tensor, up: Tensor | None, weight: Tensor, bias: Tensor | None, activation: str, dtype: torch.dtype
) -> Tensor:
    """A linear layer on that, in `dtype`."""
    product = gated_activation(gate, up, activation).to(dtype)
    return F.linear(product, weight.to(dtype), None if bias is None else bias.to(dtype))
