"""Norms that transformers writes out in Python: which convention a class follows is found by trying it."""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tokenseek_kernels import layer_norm, rms_norm, rms_norm_compress

from ..parameters import shape_of
from .trial import Trial, compare, small_copy

EPS_NAMES = ("variance_epsilon", "eps", "epsilon")


def eps_of(module: nn.Module) -> float:
    """What a norm adds under the root, by any of its names."""
    return next((getattr(module, name) for name in EPS_NAMES if hasattr(module, name)), 1e-5)


def _rms(offset: float, cast_before_weight: bool) -> Callable[[nn.Module, Tensor], Tensor]:
    rule = {"offset": offset, "cast_before_weight": cast_before_weight}

    def forward(self, hidden_states: Tensor) -> Tensor:
        inputs = hidden_states, getattr(self, "weight", None), eps_of(self)
        velora = getattr(self, "velora_input", None)
        if velora is None or not velora.is_wanted(self):
            return rms_norm(*inputs, **rule)
        projector = velora.projector
        return velora.offer(*rms_norm_compress(*inputs, projector.directions, projector.size, **rule))

    forward.rms_rule = rule
    return forward


def _layer(self, hidden_states: Tensor) -> Tensor:
    return layer_norm(hidden_states, getattr(self, "weight", None), getattr(self, "bias", None), eps_of(self))


# Llama multiplies by the weight after the cast to the input's dtype, OLMo 2 before it, Gemma by 1 + weight before it.
CONVENTIONS = (_rms(0.0, True), _rms(0.0, False), _rms(1.0, False), _layer)


def rms_rule_of(module: nn.Module) -> dict | None:
    """The options of [`rms_norm`] that a lean norm computes with; `None` for any other module."""
    return getattr(type(module).forward, "rms_rule", None)


def is_candidate(module: nn.Module) -> bool:
    """Whether it is a norm of one argument that is not torch's own, which saves as little as ours."""
    return (
        "Norm" in type(module).__name__
        and not isinstance(module, (nn.LayerNorm, nn.RMSNorm))
        and next(module.children(), None) is None
        and len(inspect.signature(module.forward).parameters) == 1
        and all(p is None or len(shape_of(p)) == 1 for p in module._parameters.values())
    )


def width_of(module: nn.Module) -> int:
    """How many features `module` normalises; any, where it has neither weight nor shape."""
    parameter = next(module.parameters(), None)
    return getattr(module, "normalized_shape", (64,))[-1] if parameter is None else shape_of(parameter)[0]


def lean_forward(module: nn.Module, dtype: torch.dtype) -> tuple[Callable, Trial] | None:
    """The convention that computes what `module` does, and its trial in `dtype`; `None` if none does."""
    shapes = {name: shape_of(p) for name, p in module._parameters.items() if p is not None}
    width = width_of(module)

    def build() -> nn.Module:
        return small_copy(module, {name: 1 + 0.5 * torch.randn(shape) for name, shape in shapes.items()}, {})

    found = []
    for forward in CONVENTIONS:
        # in float32 the conventions with and without an offset differ, in bfloat16 the places of the cast
        if compare(build, forward, width, torch.float32).same:
            found.append((compare(build, forward, width, torch.bfloat16).error, forward))
    if not found:
        return None
    forward = min(found, key=lambda pair: pair[0])[1]
    trial = compare(build, forward, width, dtype)
    return (forward, trial) if trial.same else None
