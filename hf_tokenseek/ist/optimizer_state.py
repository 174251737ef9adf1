"""What becomes of a layer's optimizer state when it stops training, and when it trains again."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .zero import ZeroStateKeeper, tensor_bytes


def keeper_of(optimizer, policy: str) -> "StateKeeper | ZeroStateKeeper":
    """
    Who keeps the state of an optimizer.

    Args:
        optimizer (`torch.optim.Optimizer`): possibly inside wrappers of accelerate and DeepSpeed.
        policy (`str`): `"free"`, `"keep"` or `"offload"`; ZeRO knows the first only.
    """
    while True:
        if hasattr(optimizer, "bit16_groups") or hasattr(optimizer, "fp32_partitioned_groups_flat"):
            return ZeroStateKeeper(optimizer)
        if not hasattr(optimizer, "optimizer"):
            return StateKeeper(optimizer, policy)
        optimizer = optimizer.optimizer


class StateKeeper:
    """
    Frees, keeps or offloads the state of parameters that sit a period out.

    For optimizers that hold the state of each parameter in `state[parameter]` and make it when it is missing: torch's,
    transformers' Adafactor, bitsandbytes'. Step counts are per parameter there, so a freed one starts afresh.

    Args:
        optimizer (`torch.optim.Optimizer`): with the parameters of all layers.
        policy (`str`): `"free"`, `"keep"` or `"offload"`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, policy: str):
        self.optimizer, self.policy = optimizer, policy
        self.offloaded: dict[nn.Parameter, dict] = {}
        self._filled: list[nn.Parameter] = []
        self._hooks = []
        if any(hasattr(parameter, "full_tensor") for parameter in self._parameters()):
            # torch.distributed.checkpoint reads the state of every sharded parameter, also of those that have none
            self._hooks += [
                self.optimizer.register_state_dict_pre_hook(lambda optimizer: self._fill()),
                self.optimizer.register_state_dict_post_hook(lambda optimizer, state: self._empty()),
            ]

    @property
    def known(self) -> set[int]:
        """Ids of the parameters that are stepped."""
        return {id(parameter) for parameter in self._parameters()}

    def check(self, layers: Iterable[Iterable[nn.Parameter]]) -> None:
        """Any groups of parameters will do."""

    def hold(self, parameters: Iterable[nn.Parameter]) -> None:
        """Without a gradient they do not move anyway."""

    def begin_step(self) -> None:
        """A step begins."""

    def deselect(self, parameters: Iterable[nn.Parameter]) -> None:
        """They stop training."""
        if self.policy == "keep":
            return
        for parameter in parameters:
            state = self.optimizer.state.pop(parameter, None)
            if state and self.policy == "offload":
                self.offloaded[parameter] = _moved(state, torch.device("cpu"))

    def select(self, parameters: Iterable[nn.Parameter]) -> None:
        """They train again."""
        for parameter in parameters:
            state = self.offloaded.pop(parameter, None)
            if state is not None:
                self.optimizer.state[parameter] = _moved(state, parameter.device)

    def close(self) -> None:
        """Gives offloaded state back, and the optimizer its own state dict."""
        self.select(list(self.offloaded))
        for hook in self._hooks:
            hook.remove()

    def bytes(self) -> int:
        """Of all tensors in the optimizer's state."""
        return tensor_bytes(self.optimizer)

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _fill(self) -> None:
        """Makes the state that an optimizer makes before a first step: zeros."""
        state = self.optimizer.state
        like = next((parameter for parameter in self._parameters() if state.get(parameter)), None)
        missing = [parameter for parameter in self._parameters() if not state.get(parameter)]
        for parameter in missing if like is not None else ():
            state[parameter] = {
                name: torch.zeros_like(parameter if value.shape == like.shape else value)
                for name, value in state[like].items()
            }
            self._filled.append(parameter)

    def _empty(self) -> None:
        for parameter in self._filled:
            del self.optimizer.state[parameter]
        self._filled = []


def _moved(state: dict, device: torch.device) -> dict:
    # AdamW that is not fused keeps its step counts on the CPU
    return {
        name: value.to(device) if _is_tensor(value) and value.numel() > 1 else value for name, value in state.items()
    }


def _is_tensor(value) -> bool:
    return isinstance(value, Tensor)
