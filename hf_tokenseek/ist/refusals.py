"""Which training arguments, and ways of sharing work among processes, sparse tuning does not know."""

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from transformers import TrainingArguments

from ..seek.ranks import refuse_common
from .config import IstConfig

WHY = {
    "torch_compile": "a graph would be compiled for each set of layers",
    "n_gpu": "replicas lose their gates",
    "split": "it has not been verified with it",
}


def prepare_arguments(args: TrainingArguments, config: IstConfig) -> None:
    """
    Refuses the arguments and the ways of sharing work that sparse tuning has not been verified with, and tells DDP
    that some parameters get no gradient.

    Verified by tests/distributed: DDP, FSDP2, DeepSpeed ZeRO-1, 2 and 3.

    Args:
        args (`transformers.TrainingArguments`): a trainer's arguments.
        config ([`IstConfig`]): what is to be trained.

    Raises:
        ValueError: names the argument, says why, and the next step.
    """
    state = AcceleratorState()
    refuse_common("Sparse tuning", args, state, WHY)
    _refuse_options(config, state.distributed_type)
    if args.ddp_find_unused_parameters is False:
        raise ValueError(
            "Sparse tuning does not support ddp_find_unused_parameters=False: idle layers get no gradient. Leave it "
            "out."
        )
    args.ddp_find_unused_parameters = True


def _refuse_options(config: IstConfig, kind: DistributedType) -> None:
    """Options that reach for parameters, gradients or state where others keep them."""
    refused = {
        DistributedType.FSDP: {"unbiased": (True,), "state": ("offload",)},
        DistributedType.DEEPSPEED: {
            "unbiased": (True,),
            "state": ("offload", "keep"),
            "policy": ("gradient_norm",),
        },
    }
    for name, values in refused.get(kind, {}).items():
        if (value := getattr(config, name)) in values:
            raise ValueError(
                f"Sparse tuning does not support {name}={value!r} under {kind.value}, which keeps parameters, "
                f"gradients and optimizer state its own way. Use DDP, or another value of `{name}`."
            )
