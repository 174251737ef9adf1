"""What TokenSeek can do for trl's trainers, which are known by their arguments: trl itself is not imported."""

from importlib.metadata import version

from packaging.version import Version
from torch import nn
from transformers import TrainingArguments

from .config import SeekConfig

# Verified by tests/sft: what the trainer computes from the fused head's output is what it computes in a stock run.
SUPPORTED = ("SFTConfig", "DPOConfig")
# The first whose fused head computes on CPUs too.
OLDEST = "1.16.0"


def trl_arguments(args: TrainingArguments) -> str | None:
    """The name of trl's class that the arguments are of, which tells the trainer; `None` if they are not trl's."""
    # the first of their classes that is trl's: others derive from SFTConfig
    return next((c.__name__ for c in type(args).__mro__ if c.__module__.split(".")[0] == "trl"), None)


def refuse_trl_arguments(args: TrainingArguments, config: SeekConfig, model: nn.Module) -> None:
    """
    Refuses the trl trainers, and their options, with which TokenSeek would train something else than they mean.

    Args:
        args (`transformers.TrainingArguments`): a trainer's arguments; those that are not trl's pass.
        config ([`SeekConfig`]): what is to be selected.
        model (`nn.Module`): the model, possibly inside PEFT.

    Raises:
        ValueError: names the trainer or the argument, says why, and the next step.
    """
    kind = trl_arguments(args)
    if kind is None:
        return
    if Version(version("trl")) < Version(OLDEST):
        raise ValueError(f"TokenSeek needs trl {OLDEST} or later, found {version('trl')}. Run `pip install -U trl`.")
    if kind not in SUPPORTED:
        why = "it has not been verified with selected tokens"
        if kind == "RewardConfig":
            why = "its model scores whole sequences and has no labels at tokens"
        raise ValueError(
            f"TokenSeek does not support the trl trainer that takes {kind}: {why}. It supports those that take "
            f"{' and '.join(SUPPORTED)}. Leave SeekCallback out; lean layers work with every trainer."
        )
    needs_all = {"DPOConfig": "DPO compares whole completions"}.get(kind)
    if getattr(args, "loss_type", None) == "dft":
        needs_all = "loss_type='dft' weighs each token by its own probability"
    if needs_all and not (config.labelled == 1.0 and config.ratio in (None, 1.0)):
        raise ValueError(
            f"{needs_all}, which leaves no room for labelled={config.labelled}, ratio={config.ratio}. Keep every "
            "loss row: set labelled=1.0 and ratio=None; `context` is free."
        )
    text = model.config.get_text_config()
    coefficient = getattr(args, "router_aux_loss_coef", None)
    if coefficient is None:
        coefficient = getattr(text, "router_aux_loss_coef", 0.0)
    if hasattr(text, "output_router_logits") and coefficient:
        raise ValueError(
            f"TokenSeek does not support router_aux_loss_coef={coefficient} ({text.model_type}'s default where it is "
            "not set): the router's auxiliary loss would see a subset of the tokens. Set router_aux_loss_coef=0.0."
        )
