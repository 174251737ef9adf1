"""A Trainer's run, as the estimator describes it."""

import os
from dataclasses import asdict
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from tqdm.auto import tqdm
from transformers import TrainingArguments

from .training import Training


def training_of(model: nn.Module, args: TrainingArguments, batch: int, seq: int) -> Training:
    """
    How the Trainer trains the model, with labels everywhere and without methods.

    Args:
        model (`nn.Module`): what is trained.
        args (`transformers.TrainingArguments`): how.
        batch (`int`): sequences of a micro-batch.
        seq (`int`): tokens of each.

    Raises:
        ValueError: it is none that can be simulated.
    """
    if args.fsdp or args.deepspeed or _is_divided():
        raise ValueError("memory was divided among ranks. Run `hf-tokenseek fit` with --strategy and --ranks.")
    adapters = list(getattr(model, "peft_config", {}).values())
    if any(not hasattr(adapter, "r") for adapter in adapters):
        raise ValueError(f"the adapters are none of LoRA: {[type(adapter).__name__ for adapter in adapters]}.")
    if getattr(model, "is_loaded_in_8bit", False):
        raise ValueError("the weights are 8-bit ones of bitsandbytes; 4-bit ones can be simulated.")
    wide = next(p for p in model.parameters() if p.is_floating_point()).dtype == torch.float32
    return Training(
        seq=seq,
        batch=batch,
        labelled=1.0,
        checkpointing=args.gradient_checkpointing,
        lora=max((adapter.r for adapter in adapters), default=None),
        load_in_4bit=getattr(model, "is_loaded_in_4bit", False),
        optimizer=args.optim.value,
        dtype=("mixed" if args.bf16 or args.fp16 else "fp32") if wide else "bf16",
        device=args.device.type,
    )


def largest_training(model: nn.Module, args: TrainingArguments, dataset: Any, most: int | None = None) -> Training:
    """
    The same of a micro-batch of the data's longest sequence.

    Args:
        model (`nn.Module`): what is trained.
        args (`transformers.TrainingArguments`): how.
        dataset: what on, as in [`longest_sequence`].
        most (`int`, *optional*): rows of it to read at the most; all of them if not given.

    Raises:
        ValueError: it is none that can be simulated, or nothing tells how long sequences are.
    """
    seq = longest_sequence(dataset, getattr(args, "max_length", None), most)
    return training_of(model, args, args.per_device_train_batch_size, seq)


def _is_divided() -> bool:
    # a launcher's configuration is in no argument; outside of a trainer there is no state to be asked
    divided = (DistributedType.FSDP, DistributedType.DEEPSPEED)
    return bool(AcceleratorState._shared_state) and AcceleratorState().distributed_type in divided


def methods_of(args: TrainingArguments) -> dict[str, Any]:
    """The methods that training arguments name, as [`attach`] takes them; none of plain ones."""
    methods = {"lean": True, "mlp_tiles": args.mlp_tiles} if getattr(args, "lean", False) else {}
    configs = {name: getattr(args, name, None) for name in ("seek", "velora", "ist", "lemo")}
    return methods | {name: asdict(config) for name, config in configs.items() if config is not None}


def config_of(model: nn.Module) -> Any:
    """The model's configuration without what the methods, and quantising, have made of it."""
    values = model.config.to_dict()
    values.pop("quantization_config", None)
    return type(model.config).from_dict(values)


def memory_bytes(device: torch.device) -> int:
    """Of the device, or of the whole machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def longest_sequence(dataset: Any, max_length: int | None, most: int | None = None) -> int:
    """
    Tokens of the longest sequence that a run will see.

    Args:
        dataset: of rows with `input_ids`; else `max_length` counts.
        max_length (`int`, *optional*): where the trainer cuts off.
        most (`int`, *optional*): rows to read at the most; all of them if not given.

    Raises:
        ValueError: neither tells.
    """
    rows = len(dataset) if hasattr(dataset, "__len__") else 0
    if rows == 0 or "input_ids" not in dataset[0]:
        if max_length is None:
            raise ValueError("the dataset has no `input_ids` whose lengths can be read beforehand.")
        return max_length
    numbers = tqdm(range(rows if most is None else min(rows, most)), desc="reading lengths", leave=False)
    longest = max(len(dataset[number]["input_ids"]) for number in numbers)
    return longest if max_length is None else min(longest, max_length)
