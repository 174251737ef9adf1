"""Several processes: what their ranks have to agree on, and which ways of sharing work TokenSeek does not know."""

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from transformers import TrainingArguments

from ..processes import has_peers
from .config import SeekConfig


def mean_over_ranks(value: float, device: torch.device) -> float:
    """
    The mean of a number over all ranks, the same on each of them.

    Where weights are sharded (FSDP2, ZeRO-3), a rank that trains a micro-batch plainly gathers them once and a rank
    that scouts gathers them twice: they would wait for each other. So all of them go by the mean.

    Args:
        value (`float`): this rank's number.
        device (`torch.device`): where the process group can reduce.
    """
    if not has_peers():
        return value
    total = torch.tensor(value, dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device)
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def refuse_strategies(args: TrainingArguments, config: SeekConfig) -> None:
    """
    Refuses the ways of sharing work among processes that TokenSeek has not been verified with.

    Verified by tests/distributed: DDP, FSDP2, DeepSpeed ZeRO-1, 2 and 3, also offloaded.

    Args:
        args (`transformers.TrainingArguments`): a trainer's arguments.
        config ([`SeekConfig`]): what is to be selected.

    Raises:
        ValueError: names the argument, says why, and the next step.
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"TokenSeek does not support torch.nn.DataParallel (n_gpu={args.n_gpu}): it copies the patched forward to "
            "each replica with the first one's weights. Start one process a GPU with `accelerate launch` or "
            "`torchrun`, or show it one GPU by CUDA_VISIBLE_DEVICES."
        )
    state = AcceleratorState()
    found = split(args, state)
    if found is not None:
        raise ValueError(
            f"TokenSeek does not support {found}: a rank selects among whole sequences and whole heads, and would see "
            "a part of them. Leave it out; TokenSeek itself makes long sequences fit, with FSDP2 or ZeRO-3."
        )
    sharded = sharding(state)
    if sharded is None:
        return
    if sharded == "FSDP1":
        raise ValueError(
            "TokenSeek does not support version 1 of FSDP: its flat parameters are gathered once a step in an order "
            "that scouting breaks. Set `fsdp_version: 2` (fsdp_config={'version': 2})."
        )
    for name, unsupported in (("probe_steps", config.probe_steps), ("score", config.score == "paper")):
        if unsupported:
            raise ValueError(
                f"TokenSeek does not support {name}={getattr(config, name)!r} under {sharded}: it differentiates "
                "inside of the forward, where the weights' shards cannot follow. Use DDP, ZeRO-1 or ZeRO-2, "
                f"{'another score' if name == 'score' else 'or probe_steps=0'}."
            )


def split(args: TrainingArguments, state: AcceleratorState) -> str | None:
    """The setting by which a sequence, or a layer, is split among ranks."""
    parallelism = getattr(args, "parallelism_config", None) or getattr(state, "parallelism_config", None)
    for name in ("tp_size", "cp_size", "sp_size"):
        if (size := getattr(parallelism, name, 1) or 1) > 1:
            return f"parallelism_config.{name}={size}"
    deepspeed = getattr(state.deepspeed_plugin, "hf_ds_config", None)
    for name in ("sequence_parallel_size", "tensor_parallel.autotp_size"):
        if deepspeed is not None and (size := deepspeed.get_value(name, 1) or 1) > 1:
            return f"DeepSpeed's {name}={size}"
    return None


def sharding(state: AcceleratorState) -> str | None:
    """The name of the strategy that shards weights, if one does."""
    if state.distributed_type == DistributedType.FSDP:
        return f"FSDP{state.fsdp_plugin.fsdp_version}"
    if state.distributed_type == DistributedType.DEEPSPEED and state.deepspeed_plugin.hf_ds_config.is_zero3():
        return "ZeRO-3"
    return None


def refuse_common(method: str, args: TrainingArguments, state: AcceleratorState, why: dict[str, str]) -> None:
    """
    What neither VeLoRA nor sparse tuning knows.

    Args:
        method (`str`): what the error calls it.
        args (`transformers.TrainingArguments`): a trainer's arguments.
        state (`accelerate.state.AcceleratorState`): how work is shared.
        why (`dict[str, str]`): reasons for `"torch_compile"`, `"n_gpu"` and `"split"`.

    Raises:
        ValueError: names the argument, says why, and the next step.
    """
    if args.torch_compile:
        raise ValueError(
            f"{method} does not support torch_compile=True: {why['torch_compile']}. Set torch_compile=False."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"{method} does not support torch.nn.DataParallel (n_gpu={args.n_gpu}): {why['n_gpu']}. Start one process "
            "a GPU with `accelerate launch` or `torchrun`."
        )
    if (found := split(args, state)) is not None:
        raise ValueError(f"{method} does not support {found}: {why['split']}. Leave it out.")
    if sharding(state) == "FSDP1":
        raise ValueError(f"{method} does not support version 1 of FSDP. Set `fsdp_version: 2`.")
