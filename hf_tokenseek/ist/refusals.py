"""Which training arguments, and ways of sharing work among processes, sparse tuning does not know."""

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from transformers import TrainingArguments

from ..seek.ranks import sharding, split
from .config import IstConfig


def prepare_arguments(args: TrainingArguments, config: IstConfig) -> None:
    """
    Refuses the arguments and the ways of sharing work that sparse tuning has not been verified with, and tells DDP
    that some parameters get no gradient.

    Verified by tests/distributed: DDP and FSDP2.

    Args:
        args (`transformers.TrainingArguments`): a trainer's arguments.
        config ([`IstConfig`]): what is to be trained.

    Raises:
        ValueError: names the argument, says why, and the next step.
    """
    state = AcceleratorState()
    if args.torch_compile:
        raise ValueError(
            "Sparse tuning does not support torch_compile=True: a graph would be compiled for each set of layers. Set "
            "torch_compile=False."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"Sparse tuning does not support torch.nn.DataParallel (n_gpu={args.n_gpu}): replicas lose their gates. "
            "Start one process a GPU with `accelerate launch` or `torchrun`."
        )
    if (found := split(args, state)) is not None:
        raise ValueError(f"Sparse tuning does not support {found}: it has not been verified with it. Leave it out.")
    if state.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError(
            "Sparse tuning does not support DeepSpeed: ZeRO steps all layers in one flat buffer, with zeros for idle "
            "ones, and their momentum would go on moving them. Use DDP or FSDP2."
        )
    sharded = sharding(state)
    if sharded == "FSDP1":
        raise ValueError("Sparse tuning does not support version 1 of FSDP. Set `fsdp_version: 2`.")
    for name, unsupported in (("unbiased", config.unbiased), ("state", config.state == "offload")):
        if sharded and unsupported:
            raise ValueError(
                f"Sparse tuning does not support {name}={getattr(config, name)!r} under {sharded}: it reaches for "
                f"whole parameters. Use DDP, or {'unbiased=False' if name == 'unbiased' else 'another state'}."
            )
    if args.ddp_find_unused_parameters is False:
        raise ValueError(
            "Sparse tuning does not support ddp_find_unused_parameters=False: idle layers get no gradient. Leave it "
            "out."
        )
    args.ddp_find_unused_parameters = True
