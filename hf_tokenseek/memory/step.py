"""One real training step, of a real model or of one without data."""

import inspect
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..patching import Attachment, attach
from ..seek.batch import IGNORE, known_counts
from ..velora.optimizer import velora_adamw
from .four_bit import in_4bit
from .peaks import Peak
from .tracker import MemoryTracker
from .training import Training, optimizer_of

# periods after which sparse tuning has drawn its lowest layer, unless its policy never does
PERIODS = 256


def build_model(config, training: Training) -> nn.Module:
    """
    The model as it is trained, with random weights.

    Args:
        config (`transformers.PreTrainedConfig`): of a causal language model.
        training ([`Training`]): how.

    Raises:
        ModuleNotFoundError: `lora` is asked for and PEFT is not installed, or `load_in_4bit` and bitsandbytes is not.
    """
    from transformers import AutoModelForCausalLM

    state = training.model_state
    wide = training.dtype != "bf16" if state is None else state.dtype == torch.float32
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32 if wide else torch.bfloat16).train()
    if training.load_in_4bit:
        model = in_4bit(model)
    if training.lora is not None:
        model = with_lora(model, training)
    if training.checkpointing:
        with warnings.catch_warnings():
            # the Trainer calls it by the same name
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable()
    if state is not None:
        state.give(model)
    return model


def with_lora(model: nn.Module, training: Training) -> nn.Module:
    """The model with adapters where the model at hand has them, or on all linear layers."""
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError:
        raise ModuleNotFoundError("`lora` needs the package `peft`. Run `pip install peft`.") from None
    state = training.model_state
    everywhere = {"task_type": "CAUSAL_LM", "r": training.lora, "target_modules": "all-linear"}
    return get_peft_model(model, LoraConfig(**(everywhere if state is None else state.adapter)))


def track_step(
    model: nn.Module, training: Training, mode: AbstractContextManager | None = None
) -> tuple[dict[str, Peak], int, dict[int, int]]:
    """
    Trains a step; the largest moment of each of its phases as it is from the second step on, and what was saved.

    The first forward and backward pass run without the optimizer's state, which is added to what they had.

    Args:
        model (`nn.Module`): from [`build_model`].
        training ([`Training`]): what it was built for.
        mode (`AbstractContextManager`, *optional*): enters a `FakeTensorMode` and returns it, if its tensors are fake.

    Returns:
        `(peaks, saved_bytes, saved_layers_bytes)`: by phase, what autograd had saved at the end of forward, and what
        of it belongs to each decoder layer.

    Raises:
        ValueError: a method refuses the model.
    """
    with tracked_forward(model, training, mode) as (tracker, optimizer, loss):
        saved, alive = tracker.saved.bytes, tracker.now
        loss.backward()
        before = dict(tracker.peaks)
        optimizer.step()
        tracker.peaks.clear()
        optimizer.step()
    state = {label: size for label, size in tracker.now.labels.items() if label.kind == "optimizer"}
    peaks = {**{name: peak.beside(state) for name, peak in before.items()}, **tracker.peaks}
    return peaks, saved, alive.layers_of("activations")


def track_saved_layers(
    model: nn.Module, training: Training, mode: AbstractContextManager | None = None
) -> dict[int, int]:
    """The last of what [`track_step`] returns, for a third of the time: no more than a forward pass runs."""
    with tracked_forward(model, training, mode) as (tracker, _, _):
        return tracker.now.layers_of("activations")


@contextmanager
def tracked_forward(
    model: nn.Module, training: Training, mode: AbstractContextManager | None
) -> Iterator[tuple[MemoryTracker, torch.optim.Optimizer, Tensor]]:
    """A forward pass of the kind whose step takes the most; yields the tracker, still at work, and the loss."""
    with attached(model, training.methods) as handles:
        optimizer = build_optimizer(model, training, handles)
        step = draw_lowest_layer(handles)
        with mode or nullcontext() as fake:
            if fake is not None:
                take_code_books(optimizer, fake)
            ids = torch.zeros(training.batch, training.seq, dtype=torch.long)
            labels = ids.clone()
            labels[:, : training.seq - training.labels] = IGNORE
            # a GPU's kernels cannot be looked into without one
            inside = training.device == "cpu"
            tracker = MemoryTracker(model, ids, labels, optimizer=optimizer, parts=training.parts, inside=inside)
            with tracker:
                handles.begin_step(step)
                yield tracker, optimizer, loss_of(model, training, ids, labels)


@contextmanager
def attached(model: nn.Module, methods: dict[str, Any]) -> Iterator[Attachment]:
    """The methods on the model, inside of the block; none of them is plain training."""
    if not any(methods.values()):
        yield Attachment()
        return
    with attach(model, **methods) as handles:
        yield handles


def build_optimizer(model: nn.Module, training: Training, handles: Attachment) -> torch.optim.Optimizer:
    """The optimizer that the Trainer would make of the weights that train."""
    kind, options = optimizer_of(training.optimizer)
    if handles.velora is not None and handles.velora.config.compressed_state:
        kind, options = velora_adamw(kind, options, training.optimizer, handles.velora.config.moments)
    if training.device == "cuda" and not options.get("fused") and "foreach" in inspect.signature(kind).parameters:
        # what torch does by itself on a GPU
        options = {**options, "foreach": True}
    # the rate does not matter, but some have no default
    optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=1e-3, **options)
    if handles.ist is not None:
        handles.ist.manage(optimizer)
    return optimizer


def take_code_books(optimizer: torch.optim.Optimizer, mode: FakeTensorMode) -> None:
    """Those of 8-bit optimizers are computed from numbers, and so before the mode was entered."""
    for name, book in getattr(optimizer, "name2qmap", {}).items():
        optimizer.name2qmap[name] = mode.from_tensor(book)


def draw_lowest_layer(handles: Attachment) -> int:
    """The first step in which sparse tuning trains the lowest layer it may train: a run's peak is that one's."""
    ist = handles.ist
    if ist is None:
        return 0
    lowest = ist.trained[ist.policy.first]
    for step in range(0, PERIODS * ist.config.period, ist.config.period):
        ist.begin_step(step)
        if ist.active[0] == lowest:
            return step
    return 0


def loss_of(model: nn.Module, training: Training, ids: Tensor, labels: Tensor) -> Tensor:
    """The loss of a micro-batch, computed as the Trainer does."""
    forward = model
    if training.dtype == "mixed":
        from accelerate.utils.operations import convert_outputs_to_fp32

        # as accelerate wraps a model's forward
        forward = convert_outputs_to_fp32(torch.autocast(ids.device.type, torch.bfloat16)(model))
    with known_counts([training.seq] * training.batch, [training.labels] * training.batch):
        return forward(input_ids=ids, labels=labels).loss
