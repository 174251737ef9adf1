"""What a model at hand is beyond its configuration: what it takes to build another one that keeps as many bytes."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..ist.attach import IstHandle
from ..patched_forward import hooked_by
from .four_bit import is_4bit, weights_of

# where VeLoRA puts the compressed gradient of a weight, which then does not ask for one itself
_COMPRESSED = "velora_gradient"
# of transformers and of PEFT: has adapters get a gradient under reentrant checkpointing
_INPUT_GRADIENTS = "make_inputs_require_grad"


@dataclass(frozen=True)
class ModelState:
    """
    How a model at hand was made, without the methods on it.

    Args:
        adapter (`dict`, *optional*): fields of its LoRA, as `adapter_config.json` has them; `None` where it has none.
        parameters (`dict[str, tuple[int, str, bool]]`):
            By name: how many weights, their dtype (`None` where they are packed into 4 bits), and whether they train.
        input_gradients (`bool`): whether what the embeddings return asks for a gradient in any case.
    """

    adapter: dict[str, Any] | None
    parameters: dict[str, tuple[int, str | None, bool]]
    input_gradients: bool

    @classmethod
    def of(cls, model: nn.Module) -> "ModelState":
        """
        Reads it off a model, whether methods are attached or not.

        Raises:
            ValueError: it has other adapters than one LoRA.
        """
        compressed = {m.weight for m in model.modules() if hasattr(m, _COMPRESSED)}
        ist = hooked_by(model, IstHandle)
        trained = compressed | (set() if ist is None else ist.frozen)
        parameters = {
            name: (weights_of(p), _dtype_of(p), p.requires_grad or p in trained)
            for name, p in model.named_parameters()
            if not name.endswith(_COMPRESSED)
        }
        return cls(_adapter_of(model), parameters, _has_input_gradients(model))

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's first weights that are not packed."""
        return next(getattr(torch, dtype) for _, dtype, _ in self.parameters.values() if dtype is not None)

    def give(self, model: nn.Module) -> None:
        """
        Makes a model, which its configuration and adapter have been built into, like the one at hand.

        Raises:
            ValueError: the one at hand has other weights.
        """
        built = dict(model.named_parameters())
        theirs = {(name, weights, dtype is None) for name, (weights, dtype, _) in self.parameters.items()}
        mine = {(name, weights_of(p), is_4bit(p)) for name, p in built.items()}
        if theirs != mine:
            names = sorted({name for name, *_ in theirs ^ mine})
            raise ValueError(
                f"the model's weights are not those that its configuration makes: {names[:3]} and "
                f"{max(0, len(names) - 3)} more differ."
            )
        for name, (_, dtype, trains) in self.parameters.items():
            if dtype is not None:
                built[name].data = built[name].data.to(getattr(torch, dtype))
            built[name].requires_grad_(trains)
        if self.input_gradients and not _has_input_gradients(model):
            model.enable_input_require_grads()


def _dtype_of(parameter: nn.Parameter) -> str | None:
    return None if is_4bit(parameter) else str(parameter.dtype).removeprefix("torch.")


def _has_input_gradients(model: nn.Module) -> bool:
    hooks = model.get_input_embeddings()._forward_hooks.values()
    return any(getattr(hook, "__name__", "").startswith(_INPUT_GRADIENTS) for hook in hooks)


def _adapter_of(model: nn.Module) -> dict[str, Any] | None:
    adapters = list(getattr(model, "peft_config", {}).values())
    if not adapters:
        return None
    kinds = [adapter.peft_type.value for adapter in adapters]
    if kinds != ["LORA"]:
        raise ValueError(f"the adapters are not one of LoRA, but {kinds}.")
    fields = {name: sorted(v) if isinstance(v, set) else v for name, v in adapters[0].to_dict().items()}
    # how they begin takes no bytes, and may need the weights
    return {**fields, "init_lora_weights": True}
