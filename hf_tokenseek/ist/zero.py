"""Sparse tuning under DeepSpeed ZeRO, which steps all layers with flat buffers: idle ones must not move."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn


def tensor_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in an optimizer's state."""
    return sum(t.nbytes for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor))


def group_by_layer(optimizer: torch.optim.Optimizer, layers: Iterable[nn.Module]) -> None:
    """Splits parameter groups so that none has parameters of two layers: ZeRO flattens group by group."""
    layer_of = {id(p): index for index, layer in enumerate(layers) for p in layer.parameters()}
    groups = []
    for group in optimizer.param_groups:
        parts: dict[int | None, list] = {}
        for parameter in group["params"]:
            parts.setdefault(layer_of.get(id(parameter)), []).append(parameter)
        groups += [{**group, "params": part} for part in parts.values()]
    optimizer.param_groups = groups


# ZeRO-3's own, private to its class
_LAST_GRADIENTS = "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition"


class ZeroStateKeeper:
    """
    [`StateKeeper`] for ZeRO's optimizers: layers that sit a period out do not move, and start afresh the next time.

    ZeRO hands every group to the inner optimizer in each step. A learning rate of 0 keeps the weights of a held group
    to the bit, weight decay included; its moments decay, and are set to zero when it trains again. They stay in ZeRO's
    partitions all the time: sharded, not freed.

    Args:
        zero: DeepSpeed's ZeRO optimizer, of stage 1, 2 or 3.
    """

    def __init__(self, zero):
        self.zero, self.optimizer = zero, zero.optimizer
        self.offloaded: dict = {}
        self._held: set[int] = set()

    @property
    def known(self) -> set[int]:
        """Ids of the parameters that are stepped."""
        return {id(parameter) for own, _, _ in self._flattened() for parameter in own}

    def check(self, layers: Iterable[Iterable[nn.Parameter]]) -> None:
        """
        Refuses buffers that hold parameters of several layers, and optimizers that are offloaded.

        Raises:
            ValueError: says how to split them, or what to leave out.
        """
        if getattr(self.zero, "offload_optimizer", False) or getattr(self.zero, "cpu_offload", False):
            raise ValueError(
                "Sparse tuning does not support an offloaded optimizer of DeepSpeed, which keeps gradients of idle "
                "layers on the CPU. Set `offload_optimizer_device: none`."
            )
        for parameters in layers:
            ids = {id(parameter) for parameter in parameters}
            for own, _, _ in self._flattened():
                inside = [id(parameter) in ids for parameter in own]
                if any(inside) and not all(inside):
                    raise ValueError(
                        "Under DeepSpeed, sparse tuning needs a parameter group for each layer. Use TokenSeekTrainer, "
                        "which makes them, without an optimizer in DeepSpeed's own configuration."
                    )

    def hold(self, parameters: Iterable[nn.Parameter]) -> None:
        """These, and no others, do not move from now on."""
        held = self._of(parameters)
        self._held = {group for _, _, group in held}
        # stage 3 keeps a parameter's last gradient until there is another, and would clip by it
        for parameter in (parameter for own, _, _ in held for parameter in own):
            last = getattr(self.zero, _LAST_GRADIENTS, {}).get(getattr(parameter, "ds_id", None))
            if last is not None:
                last.zero_()

    def begin_step(self) -> None:
        """Schedulers have set learning rates since the last step."""
        for group in self._held:
            self.optimizer.param_groups[group]["lr"] = 0.0

    def deselect(self, parameters: Iterable[nn.Parameter]) -> None:
        """They stop training: [`hold`] sees to it."""

    def select(self, parameters: Iterable[nn.Parameter]) -> None:
        """They train again, with a state as at first."""
        for _, flat, group in self._of(parameters):
            state = self.optimizer.state.get(flat, {})
            for name, value in state.items():
                state[name] = value.zero_() if isinstance(value, Tensor) else 0 if name == "step" else value
            # DeepSpeed's own Adam counts by group
            if "step" in self.optimizer.param_groups[group]:
                self.optimizer.param_groups[group]["step"] = 0

    def bytes(self) -> int:
        """Of all tensors in the inner optimizer's state, on this rank."""
        return tensor_bytes(self.optimizer)

    def close(self) -> None:
        """Nothing was taken away."""

    def _of(self, parameters: Iterable[nn.Parameter]) -> list[tuple]:
        ids = {id(parameter) for parameter in parameters}
        return [found for found in self._flattened() if id(found[0][0]) in ids]

    def _flattened(self) -> Iterator[tuple[list[nn.Parameter], Tensor, int]]:
        """The parameters of each flat buffer, this rank's part of it, and its group in the inner optimizer."""
        zero = self.zero
        if hasattr(zero, "bit16_groups"):
            parts = zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True)
            return ((own, flat, index) for index, (own, flat) in enumerate(parts))
        parts = zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True)
        return ((own, flat, zero.sub_group_to_group_id[index]) for index, (own, flat) in enumerate(parts))
