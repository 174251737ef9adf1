"""What can be known to fail is refused before any compute, and nothing that exists is overwritten."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from hf_tokenseek.parameters import numel_of
from recipes.data import IGNORED

GIB = 2**30
WEIGHTS = ("model*.safetensors", "adapter_model.safetensors", "pytorch_model*", "global_step*")


def check_output(arguments: TrainingArguments) -> None:
    """Refuse a folder that already holds a run.

    Raises:
        `FileExistsError`: if `output_dir` holds checkpoints or a finished run, and neither is resumed.
    """
    folder = Path(arguments.output_dir)
    found = sorted(path.name for path in (*folder.glob("checkpoint-*"), *folder.glob("trainer_state.json")))
    if found and not arguments.resume_from_checkpoint:
        raise FileExistsError(
            f"output_dir={str(folder)!r} already holds a run ({', '.join(found[:3])}) and would be overwritten. "
            "Continue it with --resume_from_checkpoint true, choose another --output_dir, or remove the folder."
        )


def checkpoint_to_resume(arguments: TrainingArguments) -> str | None:
    """The checkpoint to go on from, checked to be whole.

    `--resume_from_checkpoint true` takes the last whole checkpoint of `output_dir`: a run that was killed while it
    saved has left a partial one, which is passed over. The trainer writes its state last, so a checkpoint is whole
    if its state can be read.

    Returns:
        `str`, *optional*: the checkpoint's folder; `None` if nothing is resumed.

    Raises:
        `FileNotFoundError`: if there is no whole checkpoint to resume from.
    """
    wanted = arguments.resume_from_checkpoint
    if wanted is None or str(wanted).lower() in ("false", "none", ""):
        return None
    if str(wanted).lower() != "true":
        problem = _why_not_whole(Path(wanted))
        if problem is not None:
            raise FileNotFoundError(
                f"resume_from_checkpoint={str(wanted)!r} {problem}. Give a folder `checkpoint-<step>` of a run, or "
                "`true` for the last whole one in output_dir."
            )
        return str(wanted)
    folder = Path(arguments.output_dir)
    numbered = [(path.name.removeprefix("checkpoint-"), path) for path in folder.glob("checkpoint-*")]
    for _, path in sorted(((int(number), path) for number, path in numbered if number.isdigit()), reverse=True):
        if _why_not_whole(path) is None:
            return str(path)
    raise FileNotFoundError(
        f"There is no whole checkpoint in output_dir={str(folder)!r} (found {len(numbered)} partial ones). Start the "
        "run anew without --resume_from_checkpoint."
    )


def _why_not_whole(checkpoint: Path) -> str | None:
    if not checkpoint.is_dir():
        return "is no folder"
    if not any(path for pattern in WEIGHTS for path in checkpoint.glob(pattern)):
        return "holds no weights"
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "has no trainer_state.json: it was not saved to its end"
    except json.JSONDecodeError:
        return "has a broken trainer_state.json: it was not saved to its end"
    return None if "global_step" in state else "has a trainer_state.json without global_step"


def check_lengths(model: PreTrainedModel, length: int, option: str = "max_length") -> None:
    """Refuse sequences longer than the model has positions for.

    Raises:
        `ValueError`: names both numbers.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise ValueError(
            f"{option}={length} is more than the {positions} positions of {type(model).__name__}. Set "
            f"--{option} {positions} or less."
        )


def check_records(encoded: Sequence[Mapping[str, list[int]]], name: str) -> None:
    """Refuse a data set that nothing can be learned from.

    Raises:
        `ValueError`: if it is empty, or no token of it has a label.
    """
    if not encoded:
        raise ValueError(f"The {name} data set is empty. Give it at least one record.")
    if all(label == IGNORED for record in encoded for label in record["labels"]):
        raise ValueError(
            f"No token of the {name} data set has a label, so there is nothing to learn. Check its completions, or "
            "the assistant turns of its messages."
        )


def check_strategy(accelerator: Accelerator) -> None:
    """Refuse to train by another strategy than `accelerate launch` was asked for.

    On machines without an accelerator, accelerate trains with DDP whatever an FSDP configuration says.

    Raises:
        `ValueError`: names what was asked for and what would run.
    """
    asked = {"FSDP": "ACCELERATE_USE_FSDP", "DEEPSPEED": "ACCELERATE_USE_DEEPSPEED"}
    running = accelerator.distributed_type.value
    for strategy, variable in asked.items():
        if os.environ.get(variable, "").lower() == "true" and running != strategy:
            raise ValueError(
                f"accelerate launch was asked for {strategy}, and would train with {running}: this machine has no "
                "accelerator, or it is switched off. Use recipes/accelerate/ddp.yaml, or see docs/distributed.md."
            )


def check_disk(model: PreTrainedModel, arguments: TrainingArguments) -> None:
    """Refuse to start a run whose results cannot be written.

    Counts one copy of what is saved at the end, and with a `save_strategy` one checkpoint more, with two optimizer
    states a trainable parameter.

    Raises:
        `OSError`: if the disk of `output_dir` has less free space than that.
    """
    trainable = sum(_nbytes(p) for p in model.parameters() if p.requires_grad)
    adapters_only = hasattr(model, "peft_config")
    saved = trainable if adapters_only else sum(_nbytes(p) for p in model.parameters())
    needed = saved
    if arguments.save_strategy != "no":
        needed += saved + (0 if arguments.save_only_model else 2 * trainable)
    folder = Path(arguments.output_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"The disk of output_dir={arguments.output_dir!r} has {free / GIB:.2f} GiB free, saving takes up to "
            f"{needed / GIB:.2f} GiB. Free some space, choose another --output_dir, or save less "
            "(--save_only_model true)."
        )


def _nbytes(parameter: nn.Parameter) -> int:
    return numel_of(parameter) * parameter.element_size()
