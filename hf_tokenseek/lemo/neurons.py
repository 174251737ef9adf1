"""An MLP that computes everything and remembers its largest columns: exact forward, approximate backward."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenseek_kernels.lean_mlp.activations import TORCH, Activation

from ..lean.mlps import Form, activation_name, form_of
from ..patched_forward import PatchedForward


class NeuronMlp:
    """
    Stands in front of a frozen MLP's forward; of its inner state the largest columns are kept for the backward pass.

    A column's size is what it has over all real tokens: the norm of its activation, and of its factor in a gated MLP.
    The others pass no gradient on. This is what the released code of LeMo does in place of eliminating tokens in MLPs.

    Args:
        mlp (`nn.Module`): of a known form, with plain linear layers whose weights do not train.
        share (`float`): of the columns that are kept; 1 is exact.

    Raises:
        ValueError: the MLP is of another form, or it trains.
    """

    def __init__(self, mlp: nn.Module, share: float):
        self.mlp, self.form, self.share = mlp, check_form(mlp), share
        self.activation = TORCH[activation_name(getattr(mlp, self.form.activation))]
        self._real: Tensor | None = None
        self.patch = PatchedForward(mlp, self._run)

    @contextmanager
    def counting(self, real: Tensor) -> Iterator[None]:
        """Inside the block tokens that are not `real` `(batch, rows)` have no say in which columns are kept."""
        before, self._real = self._real, real
        try:
            yield
        finally:
            self._real = before

    def undo(self) -> None:
        """Gives the MLP its forward back."""
        self.patch.undo()

    def _run(self, original: Callable, args: tuple, kwargs: dict) -> Tensor:
        hidden, form = args[0] if args else kwargs["hidden_states"], self.form
        inner = [part for name in form.inner for part in _parameters(getattr(self.mlp, name))]
        options = self._real, self.activation, self.share, form.fused
        return _Neurons.apply(hidden, *options, *_parameters(_down(self)), *inner)


class _Neurons(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, real: Tensor | None, activation: Activation, share: float, fused: bool, down, bias, *inner):
        states = [F.linear(x, weight, bias) for weight, bias in zip(inner[::2], inner[1::2], strict=True)]
        if fused:
            states = list(states[0].chunk(2, dim=-1))
        active = activation.value(states[0])
        sizes = [_sizes(state, real) for state in (active, *states[1:])]
        kept = max(1, int(share * active.shape[-1] * (1 + 1e-12)))
        columns = sum(sizes).topk(kept).indices.sort().values
        ctx.activation, ctx.fused, ctx.width = activation, fused, active.shape[-1]
        ctx.save_for_backward(columns, down, *inner[::2], *(state.index_select(-1, columns) for state in states))
        return F.linear(active * states[1] if len(states) > 1 else active, down, bias)

    @staticmethod
    def backward(ctx, grad):
        columns, down, *rest = ctx.saved_tensors
        weights = rest[:1] if ctx.fused or len(rest) == 2 else rest[:2]
        states = rest[len(weights) :]
        if ctx.fused:
            weights = weights[0].split(ctx.width)
        # under autocast weights are wider than what comes back
        weights = [weight.index_select(0, columns).to(grad.dtype) for weight in weights]
        grad_inner = grad @ down.index_select(1, columns).to(grad.dtype)
        grads = [ctx.activation.chain(grad_inner * states[1] if len(states) > 1 else grad_inner, states[0])]
        if len(states) > 1:
            grads.append(grad_inner * ctx.activation.value(states[0]))
        grad_x = sum(part @ weight for part, weight in zip(grads, weights, strict=True))
        return (grad_x, *(None for _ in ctx.needs_input_grad[1:]))


def check_form(mlp: nn.Module) -> Form:
    """
    The form of an MLP whose columns can be left out of the backward pass.

    Raises:
        ValueError: says what does not fit.
    """
    form = form_of(mlp)
    linears = [] if form is None else [getattr(mlp, name) for name in (*form.inner, form.down)]
    known = form is not None and activation_name(getattr(mlp, form.activation)) is not None
    if not known or any(type(linear) is not nn.Linear for linear in linears):
        raise ValueError(
            f"mlp='neurons' needs an MLP of plain linear layers and a known activation, got {type(mlp).__name__}. "
            "Leave its layers out of the adapter's `target_modules`, or use mlp='tokens'."
        )
    if any(parameter.requires_grad for parameter in mlp.parameters()):
        raise ValueError(
            f"mlp='neurons' gives the weights of {type(mlp).__name__} no gradient, but they train. Freeze them (LoRA "
            "on the attention does), or use mlp='tokens'."
        )
    return form


def _sizes(state: Tensor, real: Tensor | None) -> Tensor:
    """Norms of the columns of `(batch, rows, width)`, float32."""
    if real is not None:
        state = state.masked_fill(~real[:, :, None], 0.0)
    return state.flatten(0, -2).float().norm(dim=0)


def _down(owner: NeuronMlp) -> nn.Linear:
    return getattr(owner.mlp, owner.form.down)


def _parameters(linear: nn.Linear) -> tuple[Tensor, Tensor | None]:
    return linear.weight, linear.bias
