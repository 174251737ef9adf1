"""What a training run will need, from one simulated step of the real thing."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from tokenseek_kernels.dispatch import as_on_a_gpu

from ..lemo import LemoConfig
from ..processes import alone
from .fake import fake_model, fake_tensors
from .formula import keeps_scores, saved_formula_bytes
from .four_bit import weights_of
from .peaks import GIB, Label, Peak, table
from .phases import PHASES
from .step import build_model, track_saved_layers, track_step
from .tracker import layers_of
from .training import Training

NOT_MODELLED = (
    "fragmentation, the CUDA context, workspaces of cuBLAS and cuDNN, NCCL's buffers",
    "what this library's own kernels take on a GPU while they run (about 0.2 GiB), and torch's inside one call",
    "padding, and masks that it makes attention build; gradient accumulation's float32 sums",
)
DIVIDED = (
    "{strategy} on {ranks} ranks is arithmetic: {kinds} are divided by {ranks}, nothing was run on several ranks; "
    "{gathered}buckets, float32 master weights and what the engine adds are not modelled"
)


@dataclass(frozen=True)
class Estimate:
    """
    What a training step needs, from the second step on.

    Args:
        model (`str`): the model's class.
        training ([`Training`]): what was simulated.
        phases (`dict[str, Peak]`): the largest moment of each phase, in order.
        parameters (`int`): weights of the model, adapters included.
        trained (`int`): weights that train.
        saved_bytes (`int`): what autograd has saved at the end of forward.
        saved_layers_bytes (`dict[int, int]`): what of it belongs to each decoder layer.
        saved_formula_bytes (`int`, *optional*): all of it in closed form, where there is one.
    """

    model: str
    training: Training
    phases: dict[str, Peak]
    parameters: int
    trained: int
    saved_bytes: int
    saved_layers_bytes: dict[int, int]
    saved_formula_bytes: int | None

    @property
    def peak(self) -> Peak:
        """The largest moment of all."""
        return max(self.phases.values(), key=lambda peak: peak.bytes)

    @property
    def peak_gib(self) -> float:
        """All bytes of the largest moment, in GiB."""
        return self.peak.bytes / GIB

    def notes(self) -> list[str]:
        """What the figures leave out."""
        training = self.training
        if not training.parts:
            return list(NOT_MODELLED)
        kinds = ", ".join(training.parts)
        gathered = "two gathered layers are added; " if "parameters" in training.parts else ""
        divided = DIVIDED.format(strategy=training.strategy, ranks=training.ranks, kinds=kinds, gathered=gathered)
        return [divided, *NOT_MODELLED]

    def table(self) -> str:
        """Phases and kinds in GiB, for a terminal."""
        lines = [table(self.phases)]
        peak, layers = self.peak, [size for layer, size in self.peak.layers.items() if layer is not None]
        lines.append(f"peak     {self.peak_gib:.3f} GiB in {peak.phase}, at {peak.op}")
        if layers:
            lines.append(f"layers   {min(layers) / GIB:.3f} to {max(layers) / GIB:.3f} GiB each at the peak")
        closed = ""
        if self.saved_formula_bytes is not None:
            closed = f", in closed form {self.saved_formula_bytes / GIB:.3f}"
        lines.append(f"saved    {self.saved_bytes / GIB:.3f} GiB of activations at the end of forward{closed}")
        return "\n".join([*lines, "not modelled:", *(f"  - {note}" for note in self.notes())])

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON; sizes in bytes."""
        phases = {
            name: {
                "bytes": peak.bytes,
                "kinds_bytes": peak.kinds,
                "layers_bytes": {str(layer): size for layer, size in peak.layers.items()},
                "op": str(peak.op),
            }
            for name, peak in self.phases.items()
        }
        return {
            "model": self.model,
            "training": asdict(self.training),
            "parameters": self.parameters,
            "trained": self.trained,
            "peak_bytes": self.peak.bytes,
            "peak_phase": self.peak.phase,
            "phases": phases,
            "saved_bytes": self.saved_bytes,
            "saved_layers_bytes": {str(layer): size for layer, size in self.saved_layers_bytes.items()},
            "saved_formula_bytes": self.saved_formula_bytes,
            "not_modelled": self.notes(),
        }


def estimate(config, training: Training) -> Estimate:
    """
    Runs one training step on tensors without data: the real model, methods, backward pass and optimizer.

    ```python
    found = estimate(AutoConfig.from_pretrained("..."), Training(seq=8192, methods={"seek": True, "lean": True}))
    print(found.peak_gib, found.table())
    ```

    Needs neither a GPU nor memory, and for a model of 32 layers some seconds.

    Args:
        config (`transformers.PreTrainedConfig`): of a causal language model.
        training ([`Training`]): how it is trained.

    Returns:
        [`Estimate`]: bytes by phase, kind and layer.

    Raises:
        ValueError: a method refuses the model, the sequence is longer than its positions, or it is quantised.
        ModuleNotFoundError: a package is missing that the simulated run would need.
    """
    with _without_data(config, training) as (model, simulated):
        peaks, saved, layers = track_step(model, training, simulated)
    if "parameters" in training.parts:
        gathered = {Label("parameters"): 2 * largest_unit_bytes(model)}
        peaks = {name: peak if name == "step" else peak.beside(gathered) for name, peak in peaks.items()}
    order = [*PHASES, *(name for name in peaks if name not in PHASES)]
    return Estimate(
        type(model.get_base_model() if training.lora else model).__name__,
        training,
        {name: peaks[name] for name in order if name in peaks},
        sum(weights_of(p) for p in model.parameters()),
        sum(p.numel() for p in model.parameters() if p.requires_grad),
        saved,
        layers,
        saved_formula_bytes(config, training),
    )


def estimate_saved_layers(config, training: Training) -> dict[int, int]:
    """`Estimate.saved_layers_bytes` alone, for a third of the time. Arguments and errors are those of [`estimate`]."""
    with _without_data(config, training) as (model, simulated):
        return track_saved_layers(model, training, simulated)


def check(config, training: Training) -> None:
    """
    Refuses what cannot be simulated.

    Raises:
        ValueError: says why, and what to do.
        ModuleNotFoundError: a GPU's kernels are described by Triton, which is missing.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            "The configuration belongs to quantised weights. Leave quantization_config out, and simulate QLoRA (4-bit "
            "NF4) with load_in_4bit and a rank of LoRA."
        )
    lemo = LemoConfig.parse(training.methods.get("lemo"))
    if lemo is not None and lemo.predictor is not None:
        raise ValueError(
            "A trained predictor has real weights and cannot be simulated. Any other score keeps as much."
        )
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and training.seq > positions:
        raise ValueError(
            f"seq={training.seq} is more than the {positions} positions of the model. Use fewer tokens, or a "
            "configuration with a larger max_position_embeddings."
        )
    if training.device == "cuda" and training.methods and find_spec("triton") is None:
        raise ModuleNotFoundError(
            "Simulating the methods on a GPU needs the package `triton`. Run `pip install triton`, or simulate the "
            "CPU's kernels with device='cpu'."
        )


def largest_unit_bytes(model: nn.Module) -> int:
    """Of what a rank gathers at a time: a decoder layer, or a weight outside of the layers."""
    layers = list(layers_of(model))
    inside = {p for layer in layers for p in layer.parameters()}
    units = [sum(p.nbytes for p in layer.parameters()) for layer in layers]
    return max([*units, *(p.nbytes for p in model.parameters() if p not in inside)])


@contextmanager
def _without_data(config, training: Training) -> Iterator[tuple[nn.Module, AbstractContextManager[FakeTensorMode]]]:
    """The model, and what enters the mode of its tensors."""
    check(config, training)
    mode = FakeTensorMode()
    # a run that asks how much it will take draws the same numbers afterwards
    with torch.random.fork_rng(devices=[]):
        yield fake_model(lambda: build_model(config, training), mode), _simulated(config, training, mode)


@contextmanager
def _simulated(config, training: Training, mode: FakeTensorMode) -> Iterator[FakeTensorMode]:
    with ExitStack() as entered:
        entered.enter_context(alone())
        if training.device == "cuda":
            entered.enter_context(as_on_a_gpu())
        if keeps_scores(config, training):
            entered.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield entered.enter_context(fake_tensors(mode))
