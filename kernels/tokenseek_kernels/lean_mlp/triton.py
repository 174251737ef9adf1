"""Elementwise kernels: everything is read once and written once. The matrix products are the vendor's."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenseek_kernels.compilation import Compilation, Target
from tokenseek_kernels.lean_mlp.activations import TORCH
from tokenseek_kernels.rows import as_rows

BLOCK, WARPS = 1024, 4

SQRT_HALF = tl.constexpr(0.5**0.5)
INVERSE_SQRT_2PI = tl.constexpr((2 * torch.pi) ** -0.5)
# 2 sqrt(2 / pi): tanh-GELU is x sigmoid(TANH_SLOPE (x + TANH_CUBE x^3)), because 1 + tanh(z) = 2 sigmoid(2 z)
TANH_SLOPE = tl.constexpr(2 * (2 / torch.pi) ** 0.5)
TANH_CUBE = tl.constexpr(0.044715)


def forward(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    """`act(gate) * up`, or `act(gate)`."""
    gates, ups = as_rows(gate), None if up is None else as_rows(up)
    product = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    rows, width = gates.shape
    _forward_kernel[(rows, triton.cdiv(width, BLOCK))](
        p_gate=gates,
        p_up=ups,
        p_product=product,
        gate_stride=gates.stride(0),
        up_stride=0 if ups is None else ups.stride(0),
        width=width,
        ACTIVATION=activation,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    return product


def backward(
    grad: Tensor, gate: Tensor, up: Tensor | None, activation: str, grad_gate: Tensor, needs_product: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Writes the gradient of gate into the contiguous `grad_gate`, which may be `grad`; see the operators."""
    gates, ups, grads = as_rows(gate), None if up is None else as_rows(up), as_rows(grad)
    grad_up = None if up is None else gate.new_empty(gate.shape)
    product = gate.new_empty(gate.shape) if needs_product else None
    rows, width = gates.shape
    _backward_kernel[(rows, triton.cdiv(width, BLOCK))](
        p_grad=grads,
        p_gate=gates,
        p_up=ups,
        p_grad_gate=grad_gate,
        p_grad_up=grad_up,
        p_product=product,
        grad_stride=grads.stride(0),
        gate_stride=gates.stride(0),
        up_stride=0 if ups is None else ups.stride(0),
        width=width,
        ACTIVATION=activation,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    return grad_up, product


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """act(x) and its derivative."""
    if ACTIVATION == "silu":
        sigmoid = tl.sigmoid(x)
        value = x * sigmoid
        slope = sigmoid + value * (1.0 - sigmoid)
    elif ACTIVATION == "gelu":
        below = 0.5 * (1.0 + tl.erf(x * SQRT_HALF))
        value = x * below
        slope = below + x * INVERSE_SQRT_2PI * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "gelu_tanh":
        cubic = x * x * TANH_CUBE
        sigmoid = tl.sigmoid(x * TANH_SLOPE * (1.0 + cubic))
        value = x * sigmoid
        slope = sigmoid + value * (1.0 - sigmoid) * TANH_SLOPE * (1.0 + 3.0 * cubic)
    elif ACTIVATION == "relu":
        value = tl.maximum(x, 0.0)
        slope = tl.where(x > 0.0, 1.0, 0.0)
    else:
        tl.static_assert(ACTIVATION == "relu2")
        slope = 2.0 * tl.maximum(x, 0.0)
        value = 0.25 * slope * slope
    return value, slope


@triton.jit
def gated_product(p_gate, p_up, at_gate, at_up, inside, ACTIVATION: tl.constexpr):
    """act(gate) up of a tile, in their dtype; the activation is rounded before the product, as torch rounds it."""
    DTYPE: tl.constexpr = p_gate.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if p_gate.dtype.element_ty == tl.float64 else tl.float32
    gate = tl.load(p_gate + at_gate, mask=inside, other=0.0).to(ACC)
    product, _ = _activate(gate, ACTIVATION)
    if p_up is not None:
        up = tl.load(p_up + at_up, mask=inside, other=0.0).to(ACC)
        product = product.to(DTYPE).to(ACC) * up
    return product.to(DTYPE)


@triton.jit
def _forward_kernel(
    p_gate, p_up, p_product, gate_stride, up_stride, width, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):
    """product = act(gate) up"""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    product = gated_product(p_gate, p_up, row * gate_stride + columns, row * up_stride + columns, inside, ACTIVATION)
    tl.store(p_product + row * width + columns, product, mask=inside)


@triton.jit
def _backward_kernel(
    p_grad,
    p_gate,
    p_up,
    p_grad_gate,
    p_grad_up,
    p_product,
    grad_stride,
    gate_stride,
    up_stride,
    width,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """
    grad_gate = grad up act'(gate),   grad_up = grad act(gate),   product = act(gate) up

    Each element is read before it is written, so grad_gate may lie where grad does.
    """
    DTYPE: tl.constexpr = p_gate.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if p_gate.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    output = row * width + columns
    grad = tl.load(p_grad + row * grad_stride + columns, mask=inside, other=0.0).to(ACC)
    gate = tl.load(p_gate + row * gate_stride + columns, mask=inside, other=0.0).to(ACC)
    value, slope = _activate(gate, ACTIVATION)
    product = value.to(DTYPE).to(ACC)
    if p_up is not None:
        up = tl.load(p_up + row * up_stride + columns, mask=inside, other=0.0).to(ACC)
        tl.store(p_grad_up + output, (grad * product).to(DTYPE), mask=inside)
        product *= up
        grad *= up
    if p_product is not None:
        tl.store(p_product + output, product.to(DTYPE), mask=inside)
    tl.store(p_grad_gate + output, (grad * slope).to(DTYPE), mask=inside)


def compilations(target: Target) -> list[Compilation]:
    """Every activation in bf16, gated and not; the dearest in float32 as well."""
    jobs = [(activation, "bf16", gated) for activation in TORCH for gated in (True, False)]
    jobs += [("gelu", "fp32", True)]
    return [compilation for job in jobs for compilation in _compilations(*job)]


def _compilations(activation: str, dtype: str, gated: bool) -> list[Compilation]:
    name = f"{'gated' if gated else 'plain'} {activation} {dtype}"
    constants = {"ACTIVATION": activation, "BLOCK": BLOCK}
    strides = dict.fromkeys(("gate_stride", "up_stride", "width"), "i32")
    forward = dict.fromkeys(("p_gate", "p_product", *(("p_up",) if gated else ())), f"*{dtype}") | strides
    backward = forward | {"p_grad": f"*{dtype}", "p_grad_gate": f"*{dtype}", "grad_stride": "i32"}
    if gated:
        backward["p_grad_up"] = f"*{dtype}"
    absent_forward, absent_backward = (
        {} if gated else dict.fromkeys(names) for names in (("p_up",), ("p_up", "p_grad_up"))
    )
    return [
        Compilation(f"{name} forward", _forward_kernel, forward, constants | absent_forward, WARPS, 3, matmul=False),
        Compilation(
            f"{name} backward", _backward_kernel, backward, constants | absent_backward, WARPS, 3, matmul=False
        ),
    ]
