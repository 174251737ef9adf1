"""The one door: argument checks and autograd."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokenseek_kernels.dispatch import resolve_impl
from tokenseek_kernels.lean_mlp import eager, reference
from tokenseek_kernels.lean_mlp.activations import ACTIVATIONS, TORCH
from tokenseek_kernels.precision import linear_dtype


class _Options(NamedTuple):
    activation: str
    dtype: torch.dtype
    impl: str


class GatedActivationFunction(torch.autograd.Function):
    """Saves gate and up, which the layers that made them need not keep: the activation is cheap to compute again.

    Kept for backward: `2 * width * itemsize` bytes a row, `width * itemsize` without a gate.
    """

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor | None, activation: str, impl: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation, ctx.impl = activation, impl
        return _implementation(impl).forward(gate, up, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = _implementation(ctx.impl).backward(grad, gate, up, ctx.activation)
        return grad_gate, None if up is None else grad_up, None, None


class ActivatedLinearFunction(torch.autograd.Function):
    """Saves gate and up, or the one hidden state; neither the activation nor the product that enters the layer.

    Kept for backward beside the weight, a parameter: `2 * width * itemsize` bytes a row, `width * itemsize` without a
    gate; nothing if neither they nor the weight need a gradient.
    """

    @staticmethod
    def forward(
        ctx,
        gate: Tensor,
        up: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        product: Tensor | None,
        options: _Options,
    ) -> Tensor:
        if product is None:
            product = _implementation(options.impl).forward(gate, up, options.activation)
        if any(ctx.needs_input_grad[:2]):
            ctx.save_for_backward(gate, up, weight)
        elif ctx.needs_input_grad[2]:
            ctx.save_for_backward(gate, up, None)
        ctx.options = options
        bias = None if bias is None else bias.to(options.dtype)
        # cast here and not by autocast, whose cache would hand this weight, without its graph, to everybody else
        return F.linear(product.to(options.dtype), weight.to(options.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        needs_states, needs_weight, needs_bias = any(ctx.needs_input_grad[:2]), *ctx.needs_input_grad[2:4]
        grad_gate = grad_up = grad_weight = grad_bias = None
        grads = grad.reshape(-1, grad.shape[-1])
        with torch.autocast(grad.device.type, enabled=False):
            if needs_states or needs_weight:
                grad_gate, grad_up, product = _backward_of_states(ctx, grads, needs_states, needs_weight)
            if needs_weight:
                grad_weight = grads.T @ product.reshape(-1, product.shape[-1]).to(grad.dtype)
            if needs_bias:
                grad_bias = grads.sum(0)
        return grad_gate, grad_up, grad_weight, grad_bias, None, None


def _backward_of_states(
    ctx, grads: Tensor, needs_states: bool, needs_product: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of gate and up, and the product again."""
    gate, up, weight = ctx.saved_tensors
    implementation, activation = _implementation(ctx.options.impl), ctx.options.activation
    if not needs_states:
        return None, None, implementation.forward(gate, up, activation)
    # nobody else's, so that the gradient of gate is written over it
    grad_gate = (grads @ weight.to(grads.dtype)).view(gate.shape).to(gate.dtype)
    grad_up, product = implementation.backward_in_place(grad_gate, gate, up, activation, needs_product)
    return grad_gate, None if up is None else grad_up, product


def gated_activation(gate: Tensor, up: Tensor | None, activation: str, *, impl: str = "auto") -> Tensor:
    """`act(gate) * up`, or `act(gate)`. Differentiable once in both. Saved a row: `gate` and `up`.

    Args:
        gate (`torch.Tensor` of shape `(..., width)`):
            Any floating dtype.
        up (`torch.Tensor`, *optional*):
            Same shape and dtype.
        activation (`str`):
            `"silu"`, `"gelu"`, `"gelu_tanh"`, `"relu"` or `"relu2"`: what `ACTIVATIONS` says for a model's name of it.
        impl (`str`, *optional*, defaults to `"auto"`):
            `"auto"`, `"triton"`, `"torch"` or `"reference"`.

    Returns:
        `torch.Tensor`: same shape and dtype.

    Raises:
        ValueError: `gate` and `up` differ in shape or dtype, or `activation` or `impl` is unknown.
    """
    check_states(gate, up, None, activation)
    impl = resolve_impl(impl, gate)
    if impl == "reference":
        return reference.gated_activation(gate, up, activation)
    return GatedActivationFunction.apply(gate, up, activation, impl)


def gated_linear(
    gate: Tensor,
    up: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "silu",
    *,
    product: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """`linear(act(gate) * up, weight, bias)`: an MLP behind its first products.

    Differentiable once in all four. Saved a row: `gate` and `up`; backward computes their product again, elementwise.

    Args:
        gate (`torch.Tensor` of shape `(..., width)`):
            Any floating dtype.
        up (`torch.Tensor`):
            Same shape and dtype.
        weight (`torch.Tensor` of shape `(out, width)`):
            The layer works in its dtype, under autocast in the autocast dtype; the product is cast to it.
        bias (`torch.Tensor` of shape `(out,)`, *optional*):
            Likewise.
        activation (`str`, *optional*, defaults to `"silu"`):
            `"silu"`, `"gelu"`, `"gelu_tanh"`, `"relu"` or `"relu2"`: what `ACTIVATIONS` says for a model's name of it.
        product (`torch.Tensor`, *optional*):
            `act(gate) * up`, if it has been computed already. It gets no gradient: `gate` and `up` do.
        impl (`str`, *optional*, defaults to `"auto"`):
            `"auto"`, `"triton"`, `"torch"` or `"reference"`.

    Returns:
        `torch.Tensor`: `(..., out)`, in the dtype in which the layer works.

    Raises:
        ValueError: On shapes or dtypes that do not fit together, or an unknown `activation` or `impl`.
    """
    return _apply(gate, up, weight, bias, activation, product, impl)


def activated_linear(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    *,
    product: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """`linear(act(hidden), weight, bias)`: [`gated_linear`] for MLPs without a gate. Saved a row: `hidden`."""
    return _apply(hidden, None, weight, bias, activation, product, impl)


def _apply(
    gate: Tensor,
    up: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    product: Tensor | None,
    impl: str,
) -> Tensor:
    check_states(gate, up, product, activation)
    _check_layer(gate, weight, bias)
    impl, dtype = resolve_impl(impl, gate), linear_dtype(weight)
    if impl == "reference":
        return reference.gated_linear(gate, up, weight, bias, activation, dtype)
    product = None if product is None else product.detach()
    return ActivatedLinearFunction.apply(gate, up, weight, bias, product, _Options(activation, dtype, impl))


def _implementation(impl: str):
    """The module that computes; Triton is imported when it is first needed."""
    if impl == "torch":
        return eager
    from tokenseek_kernels.lean_mlp import operators

    return operators


def check_states(gate: Tensor, up: Tensor | None, product: Tensor | None, activation: str) -> None:
    """Refuses an unknown activation, and states that differ in shape or dtype or are not floating."""
    if activation not in TORCH:
        raise ValueError(
            f"`activation` should be one of {list(TORCH)}, got {activation!r}. "
            f"`ACTIVATIONS` has the models' names: {list(ACTIVATIONS)}."
        )
    for name, tensor in (("up", up), ("product", product)):
        if tensor is not None and (tensor.shape != gate.shape or tensor.dtype != gate.dtype):
            raise ValueError(
                f"`{name}` must be {gate.dtype} of shape {list(gate.shape)}, as its gate is, got {tensor.dtype} of "
                f"shape {list(tensor.shape)}."
            )


def _check_layer(gate: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.dim() != 2 or weight.shape[1] != gate.shape[-1]:
        raise ValueError(
            f"`weight` must be [out, {gate.shape[-1]}] for an input of shape {list(gate.shape)}, got "
            f"{list(weight.shape)}. Hand over `weight.T` where it is stored as [in, out]."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"`bias` must be [{weight.shape[0]}], one per row of `weight`, got {list(bias.shape)}.")
