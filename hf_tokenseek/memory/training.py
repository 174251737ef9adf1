"""What is trained, how, and on what: everything that decides about memory."""

import inspect
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.optimization import Adafactor

from ..patching import attach
from .model_state import ModelState

# what the Trainer makes of `optim`, for those whose steps run on fake tensors
_TORCH: dict[str, tuple[type, dict[str, Any]]] = {
    "adamw_torch_fused": (torch.optim.AdamW, {"fused": True}),
    "adamw_torch": (torch.optim.AdamW, {}),
    "sgd": (torch.optim.SGD, {}),
    "rmsprop": (torch.optim.RMSprop, {}),
    "adafactor": (Adafactor, {"scale_parameter": False, "relative_step": False}),
}
# of bitsandbytes, two names of the same
_EIGHT_BIT = ("adamw_bnb_8bit", "adamw_8bit")
OPTIMIZERS = (*_TORCH, *_EIGHT_BIT)
DTYPES = ("bf16", "fp32", "mixed")
DEVICES = ("cuda", "cpu")
# what one rank holds a part of
STRATEGIES = {
    "zero1": ("optimizer",),
    "zero2": ("optimizer", "gradients"),
    "zero3": ("optimizer", "gradients", "parameters"),
    "fsdp": ("optimizer", "gradients", "parameters"),
}


@dataclass(frozen=True)
class Training:
    """
    What decides about the memory of a training run.

    Args:
        seq (`int`): tokens of a sequence.
        batch (`int`, *optional*, defaults to 1): sequences of a micro-batch, all of full length.
        labelled (`float`, *optional*, defaults to 0.05): share of the tokens that are labels, at the end.
        methods (`dict`, *optional*): what [`attach`] takes; none is plain training.
        checkpointing (`bool`, *optional*, defaults to `False`): gradient checkpointing.
        lora (`int`, *optional*): rank of LoRA adapters, on all linear layers but the head if `model_state` does not
            say where; all weights train if not given.
        load_in_4bit (`bool`, *optional*, defaults to `False`): QLoRA: frozen linear layers in NF4, double quantised.
        optimizer (`str`, *optional*, defaults to `"adamw_torch_fused"`): as in [`~transformers.TrainingArguments`].
        dtype (`str`, *optional*, defaults to `"bf16"`): `"bf16"` or `"fp32"` weights, or `"mixed"`: fp32 weights and
            products in bf16, what `TrainingArguments(bf16=True)` does. With a `model_state` weights have the dtypes
            that it names, and `"mixed"` says that products are in bf16.
        device (`str`, *optional*, defaults to `"cuda"`): whose kernels run.
        strategy (`str`, *optional*): `"zero1"`, `"zero2"`, `"zero3"` or `"fsdp"`: what is divided among `ranks`.
        ranks (`int`, *optional*, defaults to 1): processes; the batch is that of each of them.
        model_state ([`~memory.model_state.ModelState`], *optional*): of a model at hand: where its adapters are, what
            is frozen, which weights have which dtype.

    Raises:
        ValueError: a value lies outside of its allowed set.
    """

    seq: int
    batch: int = 1
    labelled: float = 0.05
    methods: dict[str, Any] = field(default_factory=dict)
    checkpointing: bool = False
    lora: int | None = None
    load_in_4bit: bool = False
    optimizer: str = "adamw_torch_fused"
    dtype: str = "bf16"
    device: str = "cuda"
    strategy: str | None = None
    ranks: int = 1
    model_state: ModelState | None = None

    def __post_init__(self):
        for name in ("seq", "batch", "lora", "ranks"):
            value = getattr(self, name)
            if value is not None and value < (2 if name == "seq" else 1):
                raise ValueError(f"`{name}` should be at least {2 if name == 'seq' else 1}, got {value}.")
        if not 0 < self.labelled <= 1:
            raise ValueError(f"`labelled` should be a share in (0, 1], got {self.labelled}.")
        if self.load_in_4bit and self.lora is None:
            raise ValueError(
                "`load_in_4bit` freezes the weights and needs adapters. Set `lora` to a rank, such as 16."
            )
        if (self.strategy is None) != (self.ranks == 1):
            raise ValueError(
                f"`strategy` divides memory among at least 2 `ranks`, got {self.strategy!r} with {self.ranks}. Set "
                f"both, strategy to one of {list(STRATEGIES)}."
            )
        strategies = (None, *STRATEGIES)
        allowed = {"optimizer": list(OPTIMIZERS), "dtype": DTYPES, "device": DEVICES, "strategy": strategies}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"`{name}` should be one of {list(values)}, got {getattr(self, name)!r}.")
        known = set(inspect.signature(attach).parameters) - {"model"}
        if unknown := sorted(set(self.methods) - known):
            raise ValueError(f"`methods` has unknown names {unknown}. Allowed: {sorted(known)}.")

    @property
    def parts(self) -> dict[str, int]:
        """Kinds of memory of which a rank holds one of so many parts."""
        return dict.fromkeys(STRATEGIES.get(self.strategy, ()), self.ranks)

    @property
    def labels(self) -> int:
        """Labelled tokens of a sequence; the first token is predicted by none."""
        return min(self.seq - 1, math.ceil(self.labelled * self.seq))


def optimizer_of(name: str) -> tuple[type, dict[str, Any]]:
    """
    Class and options of an optimizer.

    Args:
        name (`str`): of `OPTIMIZERS`.

    Raises:
        ModuleNotFoundError: it is one of bitsandbytes, which is not installed.
    """
    if name in _TORCH:
        return _TORCH[name]
    try:
        from bitsandbytes.optim import AdamW
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{name!r} needs the package `bitsandbytes`. Run `pip install bitsandbytes`."
        ) from None
    return AdamW, {"optim_bits": 8}
