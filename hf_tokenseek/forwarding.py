"""What a model's forward was given, and the precision it runs in, for passes of our own over its decoder."""

import inspect
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate.state import AcceleratorState
from torch import nn

# what decides about hidden states; labels and options of the output do not
_TAKEN = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids")


def named_inputs(signature: inspect.Signature, args: tuple, kwargs: dict) -> dict:
    """
    A call's arguments by name, also those that the signature takes by any name.

    Raises:
        ValueError: the signature does not say which argument is which.
    """
    given = dict(signature.bind(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL and given.pop(parameter.name, ()):
            raise ValueError(
                f"The model's forward{signature} takes *{parameter.name}, which does not say what is what. Name the "
                "arguments in the signature of your class, or do not override `forward`."
            )
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= given.pop(parameter.name, {})
    return given


def decoder_inputs(given: dict) -> dict:
    """Those of a causal language model's arguments that its decoder takes and hidden states depend on."""
    return {name: given[name] for name in _TAKEN if given.get(name) is not None}


def mixed_precision(model: nn.Module) -> torch.dtype | None:
    """The dtype of accelerate's autocast if it has wrapped this instance's forward: a later patch is outside of it."""
    if "_original_forward" not in vars(model):
        return None
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(AcceleratorState().mixed_precision)


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    """Autocast to `dtype`, or nothing."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)
