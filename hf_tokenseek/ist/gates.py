"""What a layer does while it is idle: compute, and keep nothing for weights that do not train."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ..patched_forward import PatchedForward
from ..patching import recomputed_within


class Gate:
    """
    Stands in front of one decoder layer's forward.

    Parameters keep `requires_grad` for everybody who looks at them between forwards (optimizers, DDP, FSDP); only
    while an idle layer runs, also again under gradient checkpointing, do they not ask for a gradient, so that autograd
    saves nothing for them.

    Args:
        layer (`nn.Module`): the decoder layer; its instance gets another `forward`.

    Attributes:
        idle (`bool`): whether its weights sit this period out.
        cut (`bool`): whether nothing below it, itself included, trains: it runs without gradient at all.
    """

    def __init__(self, layer: nn.Module):
        self.layer, self.idle, self.cut = layer, False, False
        self.patch = PatchedForward(layer, self._run, when=lambda: self.idle and torch.is_grad_enabled())

    def undo(self) -> None:
        """Gives the layer its forward back."""
        self.patch.undo()

    def _run(self, original: Callable, args: tuple, kwargs: dict):
        # reentrant checkpointing wants an output that leads back to the input
        if self.cut and not _is_reentrant(self.layer):
            with torch.no_grad():
                return original(*args, **kwargs)
        with recomputed_within(self.layer, partial(frozen, self.layer)):
            return original(*args, **kwargs)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Its parameters do not ask for a gradient inside the block."""
    trained = trained_parameters(module)
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def trained_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Those that ask for a gradient."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _is_reentrant(layer: nn.Module) -> bool:
    if not getattr(layer, "gradient_checkpointing", False):
        return False
    checkpoint = getattr(layer, "_gradient_checkpointing_func", None)
    return bool(getattr(checkpoint, "keywords", {}).get("use_reentrant", False))


def tuners(layer: nn.Module) -> list[nn.Module]:
    """PEFT's layers inside of a decoder layer, the outermost ones, seen without importing PEFT."""
    found, inside_of = [], None
    for path, module in layer.named_modules():
        if inside_of is not None and path.startswith(inside_of):
            continue
        inside_of = None
        if hasattr(module, "base_layer") and hasattr(module, "active_adapters"):
            found.append(module)
            inside_of = f"{path}."
    return found


def weakened(own: Tensor, full: Tensor, beta: float) -> Tensor:
    """`own + beta (full - own)`: the same bits where there is nothing between them."""
    return torch.lerp(own.to(full.dtype), full, beta)
