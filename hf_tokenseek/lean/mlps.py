"""MLPs: gate and up (or the one hidden state) are kept, activation and product are computed again in backward."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from tokenseek_kernels import ACTIVATIONS, activated_linear, gated_activation, gated_activation_compress, gated_linear

from .adapters import plain_adapters, with_adapters
from .trial import Trial, compare, small_copy

# hidden and intermediate size of a trial: far apart, so that bytes a row are read as a multiple of each
TRIAL_WIDTHS = (2, 500)


@dataclass(frozen=True)
class Form:
    """
    Names under which a family's MLP keeps its parts.

    Args:
        inner (`tuple[str, ...]`): the linear layers before the activation: gate and up, or one.
        down (`str`): the linear layer after it.
        activation (`str`): the activation module.
        fused (`bool`): whether the one inner layer computes gate and up side by side.
    """

    inner: tuple[str, ...]
    down: str
    activation: str
    fused: bool = False


FORMS = (
    Form(("gate_proj", "up_proj"), "down_proj", "act_fn"),
    Form(("w1", "w3"), "w2", "act_fn"),
    Form(("gate_up_proj",), "down_proj", "activation_fn", fused=True),
    Form(("fc1",), "fc2", "activation_fn"),
    Form(("c_fc",), "c_proj", "act"),
    Form(("dense_h_to_4h",), "dense_4h_to_h", "act"),
    Form(("up_proj",), "down_proj", "act_fn"),
)


def form_of(module: nn.Module) -> Form | None:
    """The form whose parts `module` has: these linear layers and no other child with parameters."""
    children = dict(module.named_children())
    linears = {name for name, child in children.items() if next(child.parameters(), None) is not None}
    for form in FORMS:
        if linears == {*form.inner, form.down} and form.activation in children:
            return form if all(hasattr(children[name], "in_features") for name in linears) else None
    return None


def lean_forward(module: nn.Module, form: Form, dtype: torch.dtype) -> tuple[Callable, Trial] | None:
    """A forward that computes what `module` does, and its trial in `dtype`; `None` if the form does not fit."""
    activation = activation_name(getattr(module, form.activation))
    if activation is None:
        return None

    def forward(self, hidden_states: Tensor) -> Tensor:
        inner = [getattr(self, name)(hidden_states) for name in form.inner]
        if form.fused:
            inner = inner[0].chunk(2, dim=-1)
        return activated_down(getattr(self, form.down), inner, activation, getattr(self, form.activation))

    hidden, intermediate = TRIAL_WIDTHS

    def build() -> nn.Module:
        sizes = dict.fromkeys(form.inner, (hidden, intermediate * (2 if form.fused else 1)))
        sizes[form.down] = (intermediate, hidden)
        linears = {
            name: nn.Linear(*size, bias=getattr(getattr(module, name), "bias", None) is not None)
            for name, size in sizes.items()
        }
        return small_copy(module, {}, linears)

    if not compare(build, forward, hidden, torch.float32).same:
        return None
    trial = compare(build, forward, hidden, dtype)
    return (forward, trial) if trial.same else None


def activated_down(down: nn.Module, inner: list[Tensor], activation: str, module: nn.Module) -> Tensor:
    """
    `down(act(gate) * up)` or `down(act(hidden))` without keeping what stands in the brackets.

    A plain linear layer is computed by our function; a LoRA layer by its frozen base, which keeps nothing of its
    input, and our function in place of its A. Any other layer (DoRA, watched by hooks) runs as it is and keeps its
    input if it needs it; the activation of a gated MLP is not kept even then. VeLoRA's layer gets the product
    compressed, where Triton runs in the same pass.
    """
    gated = len(inner) == 2
    linear = gated_linear if gated else activated_linear
    if type(down) is nn.Linear and not _is_hooked(down):
        return linear(*inner, down.weight, down.bias, activation)
    velora = getattr(down, "velora_input", None)
    if velora is not None and velora.is_wanted(down):
        states, projector = (inner if gated else (inner[0], None)), velora.projector
        return down(
            velora.offer(*gated_activation_compress(*states, activation, projector.directions, projector.size))
        )
    product = gated_activation(*inner, activation) if gated else module(inner[0])
    adapters = None if _is_hooked(down) else plain_adapters(down)
    if adapters is None:
        return down(product)
    computed = product.detach()
    return with_adapters(down, product, adapters, lambda a: linear(*inner, a, None, activation, product=computed))


def _is_hooked(module: nn.Module) -> bool:
    """Whether somebody watches the module's call, which would not take place."""
    return bool(
        module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
    )


def activation_name(activation: nn.Module) -> str | None:
    """Our name of a transformers activation module."""
    for name, ours in ACTIVATIONS.items():
        if type(activation) is type(ACT2FN[name]):
            return ours
    return None
