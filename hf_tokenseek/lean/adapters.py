"""LoRA layers of PEFT: one kept input in its own dtype instead of a cast or dropped copy in each of them."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from tokenseek_kernels import lora_delta

# PEFT's layers whose forward is base(x) + scaling * B(A(dropout(x))) and nothing else
PLAIN_LORA = ("Linear", "Linear4bit", "Linear8bitLt")


def is_lora(module: nn.Module) -> bool:
    """Whether `module` is one of PEFT's plain LoRA layers, seen without importing PEFT."""
    kind = getattr(module, "_plain_class", type(module))  # a lean one is one, too
    return kind.__name__ in PLAIN_LORA and kind.__module__.startswith("peft.tuners.lora.")


def plain_adapters(module: nn.Module) -> list[str] | None:
    """Names of the adapters that `module` adds now, or `None` if it does anything else than add plain LoRA."""
    # whoever has put another forward in front of this instance wants it to be called
    if not hasattr(module, "lora_A") or module.disable_adapters or module.merged or "forward" in vars(module):
        return None
    active = [name for name in module.active_adapters if name in module.lora_A]
    # VeLoRA's A keeps less of the input than our function would
    others = (name in module.lora_variant or hasattr(module.lora_A[name], "velora_input") for name in active)
    return None if any(others) else active


def with_adapters(
    module: nn.Module, x: Tensor, adapters: list[str], inner: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """
    What a LoRA layer computes: its base layer's output plus each adapter's.

    Args:
        module (`nn.Module`): PEFT's layer.
        x (`torch.Tensor`): its input.
        adapters (`list[str]`): from [`plain_adapters`].
        inner (`Callable`, *optional*): computes `linear(x, A)` without keeping `x`; used where there is no dropout.
    """
    result = module.base_layer(x)
    dtype = result.dtype
    for name in adapters:
        a, b, scaling = module.lora_A[name], module.lora_B[name], module.scaling[name]
        dropout = getattr(module.lora_dropout[name], "p", 0.0) if module.training else 0.0
        if inner is not None and not dropout:
            delta = F.linear(inner(a.weight), b.weight) * scaling
        else:
            delta = lora_delta(x, a.weight, b.weight, scaling, dropout=dropout)
        result = result + (delta if b.bias is None else delta + b.bias * scaling)
    return result.to(dtype)


def lean_forward(plain: Callable) -> Callable:
    """The forward of a LoRA layer; `plain`, PEFT's own, runs whenever the layer does more than add plain LoRA."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        adapters = None if args or kwargs else plain_adapters(self)
        return plain(self, x, *args, **kwargs) if adapters is None else with_adapters(self, x, adapters)

    return forward
