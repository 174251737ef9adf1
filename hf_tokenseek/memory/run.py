"""A Trainer's run, as the estimator describes it."""

import os
from dataclasses import asdict, replace
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm
from transformers import TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from ..ist.attach import IstHandle
from ..lemo.attach import LemoHandle
from ..method_config import MethodConfig
from ..patched_forward import hooked_by, patched_by
from ..patching import find_causal_lm
from ..seek.attach import SeekHandle
from ..seek.attention import original_attention
from ..seek.cost import is_checkpointed
from ..velora.attach import VeloraHandle
from .model_state import ModelState
from .training import Training

# by the names that [`attach`] and the arguments have for them; lean layers have no configuration
HANDLES = {"seek": SeekHandle, "velora": VeloraHandle, "ist": IstHandle, "lemo": LemoHandle}

# options of checkpointing that change nothing about what is kept
WITHOUT_BYTES = {"use_reentrant", "preserve_rng_state"}


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
    if getattr(args, "activation_offloading", False):
        raise ValueError("activation_offloading=True keeps activations elsewhere, which cannot be simulated.")
    if getattr(model, "is_loaded_in_8bit", False):
        raise ValueError("the weights are 8-bit ones of bitsandbytes; 4-bit ones can be simulated.")
    state = ModelState.of(model)
    return Training(
        seq=seq,
        batch=batch,
        labelled=1.0,
        # the Trainer turns it on when training begins, the user may have before
        checkpointing=checkpoints(model) or args.gradient_checkpointing,
        lora=None if state.adapter is None else state.adapter["r"],
        load_in_4bit=getattr(model, "is_loaded_in_4bit", False),
        optimizer=args.optim.value,
        dtype="mixed" if args.bf16 or args.fp16 else "fp32" if state.dtype == torch.float32 else "bf16",
        device=args.device.type,
        model_state=state,
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


def checkpoints(model: nn.Module) -> bool:
    """
    Whether the model is checkpointed.

    Raises:
        ValueError: it is in part, or in a way that keeps something else.
    """
    if not is_checkpointed(model):
        return False
    for layer in (module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)):
        way = getattr(layer, "_gradient_checkpointing_func", None)
        known = getattr(way, "func", None) is checkpoint and set(way.keywords) <= WITHOUT_BYTES
        if not (layer.gradient_checkpointing and known):
            raise ValueError(
                "gradient checkpointing of some layers only, offloaded, or with a context_fn cannot be simulated."
            )
    return True


def _is_divided() -> bool:
    # a launcher's configuration is in no argument; outside of a trainer there is no state to be asked
    divided = (DistributedType.FSDP, DistributedType.DEEPSPEED)
    return bool(AcceleratorState._shared_state) and AcceleratorState().distributed_type in divided


def methods_of(args: TrainingArguments) -> dict[str, Any]:
    """The methods that training arguments name, as [`attach`] takes them; none of plain ones."""
    methods = {"lean": True, "mlp_tiles": args.mlp_tiles} if getattr(args, "lean", False) else {}
    configs = {name: getattr(args, name, None) for name in HANDLES}
    return methods | {name: asdict(simulated(config)) for name, config in configs.items() if config is not None}


def attached_methods(model: nn.Module) -> dict[str, Any]:
    """The methods that are on a supported model, as [`attach`] takes them, whoever has put them there."""
    causal = find_causal_lm(model)
    lean = [type(module) for module in model.modules() if hasattr(type(module), "_plain_class")]
    tiles = max((getattr(kind.forward, "tiles", 1) for kind in lean), default=1)
    found = {name: patched_by(causal, kind) or hooked_by(model, kind) for name, kind in HANDLES.items()}
    configs = {name: asdict(simulated(handle.config)) for name, handle in found.items() if handle is not None}
    return ({"lean": True, "mlp_tiles": tiles} if lean else {}) | configs


def simulated(config: MethodConfig) -> MethodConfig:
    """A configuration that keeps as many bytes, and needs no real weights."""
    trained = getattr(config, "predictor", None) is not None
    return replace(config, score="pooled", predictor=None) if trained else config


def config_of(model: nn.Module) -> Any:
    """The model's configuration without what the methods, and quantising, have made of it."""
    values = model.config.to_dict()
    values.pop("quantization_config", None)
    config = type(model.config).from_dict(values)
    if original_attention(model) == "eager":
        # it keeps all scores; the others keep as much as the one that is taken by default
        config._attn_implementation = "eager"
    return config


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
