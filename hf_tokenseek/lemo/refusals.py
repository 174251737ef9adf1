"""Which models and training arguments LeMo does not know."""

from accelerate.state import AcceleratorState
from torch import nn
from transformers import TrainingArguments

from ..seek.ranks import refuse_common
from ..seek.trl import trl_arguments
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


def check_with_seek(config: LemoConfig) -> None:
    """
    Refuses options that mean nothing together with TokenSeek.

    Raises:
        ValueError: names the option and the next step.
    """
    for name, value, allowed, why in (
        ("mode", "detach", "elide", "tokens that it does not select have no gradient anyway"),
        ("loss", "all", "kept", "it selects among tokens that every layer has computed"),
    ):
        if getattr(config, name) == value:
            raise ValueError(
                f"LeMo's {name}={value!r} does not go with TokenSeek: {why}. Set {name}={allowed!r}, or leave "
                "TokenSeek out (seek=None)."
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
    if config.offload_gib:
        _refuse_other_offloads(args, config)
    if config.mode == "detach" or config.loss == "all":
        return
    if args.label_smoothing_factor:
        raise ValueError(
            f"LeMo does not support label_smoothing_factor={args.label_smoothing_factor} with loss='kept': the "
            "smoothed loss would count tokens that have missed layers. Set label_smoothing_factor=0.0 or loss='all'."
        )
    kind, loss_type = trl_arguments(args), getattr(args, "loss_type", None)
    if kind not in (None, "SFTConfig") or (kind is not None and loss_type == "dft"):
        what = f"loss_type={loss_type!r}" if kind == "SFTConfig" else f"the trl trainer that takes {kind}"
        raise ValueError(
            f"LeMo does not support {what} with loss='kept': it has to see all labels, each as it is. Set loss='all' "
            "or mode='detach'."
        )


def _refuse_other_offloads(args: TrainingArguments, config: LemoConfig) -> None:
    asked = f"LeMo's offload_gib={config.offload_gib}"
    if args.gradient_checkpointing:
        raise ValueError(
            f"{asked} does not go with gradient_checkpointing=True, which keeps the layers' inputs only. Set "
            "offload_gib=0 and gradient_checkpointing_kwargs={'offload': True}, or gradient_checkpointing=False."
        )
    if getattr(args, "activation_offloading", False):
        raise ValueError(
            f"{asked} does not go with activation_offloading=True, which moves everything. Leave one out."
        )
