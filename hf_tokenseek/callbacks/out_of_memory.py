"""What a run that has run out of memory leaves behind: what was alive, and what would have fitted."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.utils import logging

from ..memory.peaks import GIB, table
from ..memory.plan import budget_of, first_fitting, recipe_options
from ..memory.run import config_of, memory_bytes, training_of
from .memory import MemoryCallback

logger = logging.get_logger(__name__)

# of these there is no class of their own
CPU_MESSAGE = "DefaultCPUAllocator: can't allocate memory"
ADVICE = 3


@contextmanager
def explained_out_of_memory(
    memory: MemoryCallback | None, model: nn.Module, args: TrainingArguments
) -> Iterator[None]:
    """
    If the block runs out of memory, writes `out_of_memory_RANK.txt` into `output_dir`; the error goes on its way.

    Args:
        memory ([`MemoryCallback`], *optional*): knows the micro-batch and what has been tracked.
        model (`nn.Module`): what is trained.
        args (`transformers.TrainingArguments`): how.
    """
    try:
        yield
    except RuntimeError as error:
        if memory is not None and is_out_of_memory(error):
            labels = memory.labels
            # nothing of ours may be at work while we simulate
            memory.stop()
            file = Path(args.output_dir) / f"out_of_memory_{args.process_index}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(explain(error, memory, model, args, labels), encoding="utf-8")
            logger.error(f"Out of memory. What was alive and what would have fitted: {file}")
        raise
    finally:
        if memory is not None:
            memory.stop()


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device's, or the CPU's, memory was not enough."""
    return isinstance(error, torch.OutOfMemoryError) or CPU_MESSAGE in str(error)


def explain(
    error: RuntimeError, memory: MemoryCallback, model: nn.Module, args: TrainingArguments, labels: Tensor | None
) -> str:
    """The whole text."""
    parts = [f"Out of memory: {str(error).splitlines()[0]}", allocator(args.device)]
    if memory.watch is not None and memory.watch.peaks:
        peak = memory.watch.peak
        parts.append(f"Largest moments of the tracked steps:\n\n{table(memory.watch.peaks)}")
        parts.append("The largest, innermost call last:\n\n" + "\n".join(f"  {line}" for line in peak.stack()))
    else:
        parts.append('No step was tracked. MemoryCallback(level="layer") tracks the first ones, by kind and layer.')
    try:
        parts.append(advise(model, args, labels))
    except (ValueError, ModuleNotFoundError) as reason:
        parts.append(f"What would have fitted cannot be simulated: {reason}")
    return "\n\n".join(parts) + "\n"


def advise(model: nn.Module, args: TrainingArguments, labels: Tensor | None) -> str:
    """
    The first ways of training, exact before approximate, that would have fitted.

    Raises:
        ValueError: the run is none that can be simulated.
    """
    if labels is None:
        raise ValueError("the model was not called with labels. Run `hf-tokenseek fit`.")
    labelled = max(1, int((labels.cpu() >= 0).sum())) / labels.numel()
    training = replace(training_of(model, args, *labels.shape), labelled=labelled)
    budget = budget_of(memory_bytes(args.device))
    found = first_fitting(config_of(model), training, budget, ADVICE)
    what = f"{training.batch} x {training.seq} tokens in {budget / GIB:.2f} GiB"
    if not found:
        return f"No setting that we know fits {what}: train fewer tokens at a time, adapters, or on several GPUs."
    lines = [f"What would have fitted {what} (simulated; all weights that trained still train):"]
    for tried in found:
        kept = {"max_length", "per_device_train_batch_size", "optim", "bf16", "use_peft", "lora_r"}
        options = {name: value for name, value in recipe_options(tried.training).items() if name not in kept}
        lines.append(f"  {tried}\n    {', '.join(f'{name}={value!r}' for name, value in options.items())}")
    return "\n".join(lines)


def allocator(device: torch.device) -> str:
    """What the allocator says, where there is one that counts."""
    if device.type != "cuda":
        return f"The machine has {memory_bytes(device) / GIB:.2f} GiB."
    allocated, reserved = torch.cuda.memory_allocated(device) / GIB, torch.cuda.memory_reserved(device) / GIB
    total = memory_bytes(device) / GIB
    return f"The device has {total:.2f} GiB; the allocator has reserved {reserved:.2f} and given out {allocated:.2f}."
