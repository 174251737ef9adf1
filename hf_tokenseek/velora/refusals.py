"""Which training arguments, and ways of sharing work among processes, VeLoRA does not know."""

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from transformers import TrainingArguments

from ..seek.ranks import refuse_common
from .config import VeloraConfig

WHY = {
    "torch_compile": "layers share what they keep through Python, which a graph does not see",
    "n_gpu": "replicas would share one cache",
    "split": "directions are drawn over whole inputs",
}


def refuse_arguments(args: TrainingArguments, config: VeloraConfig) -> None:
    """
    Refuses the arguments and the ways of sharing work among processes that VeLoRA has not been verified with.

    Verified by tests/distributed: DDP, FSDP2, DeepSpeed ZeRO-1, 2 and 3; with compressed optimizer state DDP.

    Args:
        args (`transformers.TrainingArguments`): a trainer's arguments.
        config ([`VeloraConfig`]): what is to be compressed.

    Raises:
        ValueError: names the argument, says why, and the next step.
    """
    state = AcceleratorState()
    refuse_common("VeLoRA", args, state, WHY)
    if config.compressed_state and state.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            f"compressed_state=True does not support {state.distributed_type.value}: it shards or flattens "
            "parameters, and the update reaches a weight through its compressed gradient. Use DDP, or "
            "compressed_state=False."
        )
