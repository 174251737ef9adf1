"""The kernels as custom operators, so that they run under fake tensors, `torch.compile` and opcheck."""

from torch import Tensor

from tokenseek_kernels.custom_op import custom_op
from tokenseek_kernels.lean_mlp import triton


@custom_op("tokenseek::gated_activation_forward")
def forward(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    """`act(gate) * up`, or `act(gate)`."""
    return triton.forward(gate, up, activation)


@forward.register_fake
def _(gate, up, activation):
    return gate.new_empty(gate.shape)


@custom_op("tokenseek::gated_activation_backward")
def backward(grad: Tensor, gate: Tensor, up: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    grad_gate = gate.new_empty(gate.shape)
    grad_up, _ = triton.backward(grad, gate, up, activation, grad_gate, needs_product=False)
    # operators return tensors: an empty one stands for the gradient of what is not there
    return grad_gate, gate.new_empty(0) if grad_up is None else grad_up


@backward.register_fake
def _(grad, gate, up, activation):
    return gate.new_empty(gate.shape), gate.new_empty(0 if up is None else gate.shape)


@custom_op("tokenseek::gated_activation_backward_", mutates_args=("grad",))
def backward_in_place(
    grad: Tensor, gate: Tensor, up: Tensor | None, activation: str, needs_product: bool
) -> tuple[Tensor, Tensor]:
    """Turns `grad` into the gradient of gate; returns the gradient of up, and `act(gate) * up` where it is needed."""
    outputs = triton.backward(grad, gate, up, activation, grad, needs_product)
    # operators return tensors: an empty one stands for what nobody asked for
    return tuple(gate.new_empty(0) if output is None else output for output in outputs)


@backward_in_place.register_fake
def _(grad, gate, up, activation, needs_product):
    return tuple(gate.new_empty(gate.shape if needed else 0) for needed in (up is not None, needs_product))
