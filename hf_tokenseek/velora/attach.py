"""VeLoRA on one model instance: swap its linear layers, draw directions, report, take back."""

import inspect
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor, nn

from ..lean.adapters import is_lora
from ..patched_forward import PatchedForward, is_reached, trains
from ..patching import find_causal_lm
from ..seeds import mixed_seed
from ..seek.attach import SeekHandle
from .calibration import mean_inputs
from .config import VeloraConfig
from .inputs import Input, find_inputs
from .layers import CompressedInput, VeloraDropout, VeloraLinear, share_source
from .projectors import make_projector
from .telemetry import Telemetry

STATE_VERSION = 1
# the norms that make an input, the first that a decoder layer has; a lean one compresses its output in the same pass
PRODUCERS = {
    "attention": ("input_layernorm", "attention_layernorm"),
    "mlp": ("pre_feedforward_layernorm", "pre_mlp_layernorm", "feedforward_layernorm", "post_attention_layernorm"),
}


class VeloraHandle:
    """
    Swaps the linear layers of a model instance for ones that keep a projection of their input.

    Args:
        model (`nn.Module`): a supported causal language model, possibly inside PEFT.
        config ([`VeloraConfig`]): what to compress, and how.

    Attributes:
        attached_to (`nn.Module`): the model as it was given.
        inputs (`dict[str, CompressedInput]`): what is compressed, by its place in the model.
        telemetry ([`Telemetry`]): figures since they were last read.

    Raises:
        ValueError: the model is not supported or attached already, nothing would be compressed, or an input would be
            kept whole all the same.
    """

    def __init__(self, model: nn.Module, config: VeloraConfig):
        self.attached_to, self.model, self.config = model, find_causal_lm(model), config
        if any(isinstance(module, VeloraLinear) for module in self.model.modules()):
            raise ValueError("VeLoRA is attached to this model already. Call undo() on the first handle.")
        units = list(find_inputs(self.model, config.inputs))
        check_units(self.model, units, config)
        self.telemetry, self.step = Telemetry(), 0
        self._probed_step: int | None = None
        self._drawn_step: int | None = None
        self.inputs = {
            unit.key: CompressedInput(unit, make_projector(config, unit.width), self.telemetry) for unit in units
        }
        self._hooks, self._dropouts, self._producers = [], [], []
        for compressed in self.inputs.values():
            self._swap(compressed)
        self.signature = inspect.signature(self.model.forward)
        self._patch_forward()

    def begin_step(self, step: int) -> None:
        """Tells which optimizer step the coming micro-batches belong to: it seeds all that is random."""
        self.step = step

    def resume(self) -> None:
        """Goes around whatever has replaced the model's forward since: trl's fused head, or TokenSeek."""
        if not is_reached(self._patch, past=SeekHandle):
            self._patch.undo()
            self._patch_forward()

    def undo(self) -> None:
        """Gives the model its own layers back."""
        self._patch.undo()
        for hook in self._hooks:
            hook.remove()
        for dropout in self._dropouts:
            dropout.__class__ = nn.Dropout
        for norm in self._producers:
            del norm.velora_input
        for compressed in self.inputs.values():
            for module in compressed.unit.compressible:
                module.__class__ = nn.Linear
                del module.velora_input
                if hasattr(module, "velora_gradient"):
                    del module.velora_gradient
                    module.weight.requires_grad_(True)

    def swapped(self) -> str:
        """A table of what is compressed: input, layers that read it, and MiB kept of 1,000 tokens."""
        config = self.config
        lines = [
            f"VeLoRA on {type(self.model).__name__}: groups={config.groups}, projector={config.projector}, rank="
            f"{config.rank}{', compressed gradients and optimizer state' if config.compressed_state else ''}"
        ]
        rows: dict[tuple, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
        for compressed in self.inputs.values():
            unit, itemsize = compressed.unit, compressed.unit.compressible[0].weight.element_size()
            itemsize *= compressed.copies
            before, after = (n * itemsize * 1000 / 2**20 for n in (unit.width, compressed.projector.columns))
            row = rows[unit.name, ", ".join(path.rpartition(".")[2] for path in unit.readers), bool(unit.keepers)]
            row[:] = row[0] + 1, row[1] + before, row[2] + (before + after if unit.keepers else after)
        for (name, readers, kept), (count, before, after) in rows.items():
            note = "   nothing saved: other layers keep it" if kept else ""
            lines.append(f"  {name:13} {readers:32} {count:3} x {before:9.3f} -> {after:8.3f} MiB / 1k tokens{note}")
        return "\n".join(lines)

    def report(self) -> str:
        """The table, and the figures since they were last read."""
        figures = [f"  {name} {value:.4g}" for name, value in self.telemetry.read(reset=False).items()]
        return "\n".join([self.swapped(), *figures])

    def state_dict(self) -> dict:
        """Directions and the step of their drawing: with the configuration, all that the coming steps depend on."""
        drawn = {key: c.projector for key, c in self.inputs.items() if c.projector.directions is not None}
        return {
            "version": STATE_VERSION,
            "config": asdict(self.config),
            "drawn_step": self._drawn_step,
            "draws": {key: projector.version for key, projector in drawn.items()},
            "directions": {key: projector.directions for key, projector in drawn.items()},
        }

    def load_state_dict(self, state: dict) -> None:
        """
        Goes on where [`state_dict`] was taken.

        Raises:
            ValueError: it is of another version, configuration or model.
        """
        own = {**asdict(self.config), "probe_steps": None}
        theirs = {**state["config"], "inputs": tuple(state["config"]["inputs"]), "probe_steps": None}
        if state["version"] != STATE_VERSION or own != theirs:
            changed = [name for name in own if own[name] != theirs.get(name)]
            raise ValueError(
                f"The state is of another VeLoRA configuration: {changed or 'version'} differ. Resume with the "
                f"configuration that it was saved with: {state['config']}."
            )
        if state["directions"] and set(state["directions"]) != set(self.inputs):
            raise ValueError(
                "The state is of another model: it has directions for "
                f"{sorted(set(state['directions']) ^ set(self.inputs))[:4]}, or misses them."
            )
        self._drawn_step = state["drawn_step"]
        for key, directions in state["directions"].items():
            compressed = self.inputs[key]
            device = compressed.unit.compressible[0].weight.device
            compressed.projector.load(directions.to(device), state["draws"][key])

    def _producer_of(self, unit: Input) -> nn.Module | None:
        layer = self.model.get_submodule(unit.path)
        names = PRODUCERS.get(unit.name.partition("+")[0], ())
        norm = next((getattr(layer, name) for name in names if hasattr(layer, name)), None)
        return norm if hasattr(type(norm), "_plain_class") else None

    def _patch_forward(self) -> None:
        self._patch = PatchedForward(self.model, self._train_forward, when=partial(trains, self.model))

    def _swap(self, compressed: CompressedInput) -> None:
        unit = compressed.unit
        if (norm := self._producer_of(unit)) is not None:
            norm.velora_input = compressed
            self._producers.append(norm)
        for module in unit.compressible:
            module.__class__ = VeloraLinear
            module.velora_input = compressed
            if self.config.compressed_state:
                shape = len(module.weight), compressed.projector.columns
                module.velora_gradient = nn.Parameter(module.weight.new_zeros(shape))
                module.velora_gradient.velora_module = module
                module.weight.requires_grad_(False)
        for reader in unit.readers.values():
            if is_lora(reader):
                self._hooks += share_source(compressed, reader)
                dropouts = [d for d in reader.lora_dropout.values() if type(d) is nn.Dropout]
                for dropout in dropouts:
                    dropout.__class__ = VeloraDropout
                self._dropouts += dropouts

    @torch.compiler.disable
    def _train_forward(self, original: Callable, args: tuple, kwargs: dict):
        every = self.config.probe_steps
        probing = bool(every) and self.step % every == 0 and self._probed_step != self.step
        self._probed_step = self.step if probing else self._probed_step
        if self._is_due():
            self._draw(args, kwargs)
        self.telemetry.begin_micro_batch(probing)
        self.telemetry.in_forward = True
        try:
            return original(*args, **kwargs)
        finally:
            self.telemetry.in_forward = False

    def _is_due(self) -> bool:
        if self._drawn_step is None:
            return True
        every = self.config.refresh_steps
        return bool(every) and self.step // every != self._drawn_step // every

    def _draw(self, args: tuple, kwargs: dict) -> None:
        """Draws all directions, once for all micro-batches of a step."""
        projectors = {key: compressed.projector for key, compressed in self.inputs.items()}
        means: dict[str, Tensor] = {}
        if next(iter(projectors.values())).needs_mean:
            units = [compressed.unit for compressed in self.inputs.values()]
            means = mean_inputs(self.model, units, self.signature, args, kwargs)
        for index, (key, projector) in enumerate(projectors.items()):
            generator = torch.Generator().manual_seed(mixed_seed(self.config.seed, index, self.step))
            projector.draw(means.get(key), generator, self.inputs[key].unit.compressible[0].weight)
        self._drawn_step = self.step


def check_units(model: nn.Module, units: list[Input], config: VeloraConfig) -> None:
    """
    Refuses what would compress nothing.

    Raises:
        ValueError: says why, and what to do.
    """
    missing = [name for name in config.inputs if not any(name in unit.name.split("+") for unit in units)]
    if missing:
        raise ValueError(
            f"VeLoRA finds no trained linear layer that reads {missing} in {type(model).__name__}: frozen layers keep "
            "no input, and layers that are neither nn.Linear nor PEFT's LoRA cannot be compressed. Set `inputs` to "
            f"those it has: {sorted({unit.name for unit in units}) or 'none'}."
        )
    kept = [unit for unit in units if unit.keepers]
    if kept and not config.force:
        raise ValueError(
            f"VeLoRA would save nothing of {kept[0].name!r} in {len(kept)} layers: {kept[0].path} has "
            f"{', '.join(kept[0].keepers)}, which keep the same tensor. Leave {kept[0].name!r} out of `inputs`"
            f"{', or name both blocks,' if '+' in kept[0].name else ''} or set force=True."
        )
