"""Which models and training arguments LeMo does not know."""

from accelerate.state import AcceleratorState
from torch import nn
from transformers import TrainingArguments

from ..seek.ranks import refuse_common
from .config import LemoConfig

# Families that TokenSeek supports and LeMo does not, and why.
_SHARED = "later layers attend to the keys and values of earlier ones, which keep other tokens"
REFUSED = {
    "beam": "it scales attention by position in a form that kept rows cannot be taken out of",
    "gemma3n_text": _SHARED,
    "gemma4_text": _SHARED,
    "gemma4_unified_text": _SHARED,
}


def check_model(model: nn.Module) -> None:
    """
    Refuses models whose layers cannot run on the rows they keep.

    Raises:
        ValueError: says why, and the next step.
    """
    family = model.config.get_text_config().model_type
    if family in REFUSED:
        raise ValueError(
            f"LeMo does not support model_type {family!r}: {REFUSED[family]}. Turn it off with lemo=None; TokenSeek "
            "(seek=) trains this family."
        )


WHY = {
    "torch_compile": "which rows a layer runs on changes with every batch",
    "n_gpu": "replicas lose their patched layers",
    "split": "a rank would choose among a part of the tokens",
}


def refuse_arguments(args: TrainingArguments, config: LemoConfig) -> None:
    """
    Refuses training arguments, and ways of sharing work, that LeMo has not been verified with.

    Verified by tests/distributed: DDP, FSDP2, DeepSpeed ZeRO-2 and 3.

    Args:
        args (`transformers.TrainingArguments`): a trainer's arguments.
        config ([`LemoConfig`]): what is to be kept.

    Raises:
        ValueError: names the argument, says why, and the next step.
    """
    refuse_common("LeMo", args, AcceleratorState(), WHY)
    if args.use_liger_kernel:
        raise ValueError(
            "LeMo does not support use_liger_kernel=True: its forward does not hand LeMo's keyword down to the "
            "layers. Set use_liger_kernel=False; lean=True has the layers."
        )
    if args.label_smoothing_factor and config.loss == "kept" and config.mode == "elide":
        raise ValueError(
            f"LeMo does not support label_smoothing_factor={args.label_smoothing_factor} with loss='kept': the "
            "smoothed loss would count tokens that have missed layers. Set label_smoothing_factor=0.0 or loss='all'."
        )
