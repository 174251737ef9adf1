"""What the swapped layers do: linear layers that save z in place of their input, and dropout that saves a seed."""

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokenseek_kernels import compressed_linear, seeded_dropout

from .inputs import Input
from .projectors import Projector
from .telemetry import Telemetry


@dataclass
class _Known:
    """
    An x, which is not kept alive, and its z, which is until `readers` layers have read it: then autograd keeps it, or
    nobody needs it. `version` tells whether x and the directions are still those.
    """

    storage: weakref.ref
    version: tuple
    z: Tensor | None
    readers: int

    def read(self) -> Tensor | None:
        """z, once a reader."""
        z, self.readers = self.z, self.readers - 1
        if self.readers < 1:
            self.z = None
        return z


class CompressedInput:
    """
    One tensor that several layers read, compressed once a forward.

    Args:
        unit ([`Input`]): which layers read it.
        projector ([`Projector`]): onto what it is projected.
        telemetry ([`Telemetry`]): takes the figures.

    Attributes:
        source (`torch.Tensor`, *optional*):
            The tensor itself, while a LoRA layer runs whose adapters read casts of it.
        shape (`torch.Size`, *optional*): that of what a LoRA layer reads, while it runs.
    """

    def __init__(self, unit: Input, projector: Projector, telemetry: Telemetry):
        self.unit, self.projector, self.telemetry = unit, projector, telemetry
        self.source: Tensor | None = None
        self.shape: torch.Size | None = None
        self._known: _Known | None = None

    @property
    def copies(self) -> int:
        """How many tensors there are in place of one: under dropout every adapter has its own."""
        return max(1, sum(_drops(reader) for reader in self.unit.readers.values()))

    def z(self, x: Tensor) -> Tensor:
        """
        What is kept of `x`: computed when its first reader asks, the same tensor for the others.

        Raises:
            ValueError: no directions have been drawn.
        """
        if self.source is not None and self.source.shape == x.shape:
            x = self.source
        z = self._find(x)
        if z is None:
            if self.projector.directions is None:
                raise ValueError(
                    f"VeLoRA has no directions for {self.unit.key} yet: they are drawn in the forward of the model "
                    "that was attached. Call that model, not a part of it."
                )
            self.offer(x, self.projector.compress(x))
            z = self._known.read()
        return z

    def is_read(self, x: Tensor) -> bool:
        """Whether a layer was called with its input: DoRA calls A with a unit matrix as well."""
        return self.shape is None or self.shape == x.shape

    def is_wanted(self, producer: nn.Module) -> bool:
        """Whether the module that makes x should compress it as well: in training, with directions drawn."""
        return producer.training and torch.is_grad_enabled() and self.projector.directions is not None

    def offer(self, x: Tensor, z: Tensor) -> Tensor:
        """Takes the z of `x` from whoever has computed it; returns `x`."""
        readers = len(self.unit.compressible) // self.copies
        self._known = _Known(weakref.ref(x.untyped_storage()), self._version(x), z, readers)
        self.telemetry.observe_input(x, z)
        return x

    def linear(self, module: nn.Linear, x: Tensor) -> Tensor:
        """`module(x)`, which saves z."""
        return compressed_linear(
            x,
            self.z(x),
            module.weight,
            module.bias,
            self.projector.expansion,
            self.projector.size,
            carrier=getattr(module, "velora_gradient", None),
            observe=self.telemetry.observe_gradient if self.telemetry.probing else None,
        )

    def _find(self, x: Tensor) -> Tensor | None:
        known = self._known
        if known is None or known.storage() is not x.untyped_storage() or known.version != self._version(x):
            return None
        return known.read()

    def _version(self, x: Tensor) -> tuple:
        return x._version, x.storage_offset(), x.shape, self.projector.version


class VeloraLinear(nn.Linear):
    """
    What a linear layer becomes: the same, but it saves z, and with a compressed state its gradient is one.

    Attributes:
        velora_input ([`CompressedInput`]): what it reads.
        velora_gradient (`nn.Parameter` of shape `(out, columns)`, *optional*): takes the compressed gradient. It has
            no value and is in no state dict.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled() and self.velora_input.is_read(x):
            return self.velora_input.linear(self, x)
        return super().forward(x)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(f"{prefix}velora_gradient", None)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing_keys, *further) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, *further)
        if f"{prefix}velora_gradient" in missing_keys:
            missing_keys.remove(f"{prefix}velora_gradient")


class VeloraDropout(nn.Dropout):
    """What an adapter's dropout becomes: the mask is drawn again in backward."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled() and 0 < self.p < 1:
            return seeded_dropout(x, self.p)
        return super().forward(x)


def share_source(compressed: CompressedInput, layer: nn.Module) -> list:
    """
    Hooks on one of PEFT's LoRA layers: its adapters compress what the layer read, not the cast that PEFT makes of it.

    Not under dropout, which makes another tensor for each adapter.
    """

    def before(module: nn.Module, args: tuple) -> None:
        compressed.source = None if module.training and _drops(module) else args[0]
        compressed.shape = args[0].shape

    def after(*_) -> None:
        compressed.source = compressed.shape = None

    return [layer.register_forward_pre_hook(before), layer.register_forward_hook(after, always_call=True)]


def _drops(layer: nn.Module) -> bool:
    return any(getattr(dropout, "p", 0.0) for dropout in getattr(layer, "lora_dropout", {}).values())
