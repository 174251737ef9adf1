"""Plain torch, in place wherever the tensor is nobody else's."""

from torch import Tensor

from tokenseek_kernels.lean_mlp.activations import TORCH


def forward(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    """`act(gate) * up`, or `act(gate)`."""
    value = TORCH[activation].value(gate)
    return value if up is None else value.mul_(up)


def backward(grad: Tensor, gate: Tensor, up: Tensor | None, activation: str) -> tuple[Tensor, Tensor | None]:
    """Gradients of gate and up."""
    if up is None:
        return TORCH[activation].chain(grad.clone(), gate), None
    return TORCH[activation].chain(grad * up, gate), TORCH[activation].value(gate).mul_(grad)


def backward_in_place(
    grad: Tensor, gate: Tensor, up: Tensor | None, activation: str, needs_product: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Turns `grad` into the gradient of gate; returns the gradient of up, and `act(gate) * up` where it is needed."""
    value = TORCH[activation].value(gate) if up is not None or needs_product else None
    grad_up = None
    if up is not None:
        grad_up = value * grad
        grad.mul_(up)
    TORCH[activation].chain(grad, gate)
    if not needs_product:
        return grad_up, None
    return grad_up, value if up is None else value.mul_(up)
