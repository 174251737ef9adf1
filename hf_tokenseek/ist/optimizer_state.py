"""What becomes of a layer's optimizer state when it stops training, and when it trains again."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class StateKeeper:
    """
    Frees, keeps or offloads the state of parameters that sit a period out.

    For optimizers that hold the state of each parameter in `state[parameter]` and make it when it is missing: torch's,
    transformers' Adafactor, bitsandbytes'. Step counts are per parameter there, so a freed one starts afresh.

    Args:
        optimizer (`torch.optim.Optimizer`): possibly wrapped by accelerate.
        policy (`str`): `"free"`, `"keep"` or `"offload"`.
    """

    def __init__(self, optimizer, policy: str):
        self.optimizer: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        self.policy = policy
        self.offloaded: dict[nn.Parameter, dict] = {}
        self._filled: list[nn.Parameter] = []
        self._hooks = []
        if any(hasattr(parameter, "full_tensor") for parameter in self._parameters()):
            # torch.distributed.checkpoint reads the state of every sharded parameter, also of those that have none
            self._hooks += [
                self.optimizer.register_state_dict_pre_hook(lambda optimizer: self._fill()),
                self.optimizer.register_state_dict_post_hook(lambda optimizer, state: self._empty()),
            ]

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
        return sum(t.nbytes for state in self.optimizer.state.values() for t in state.values() if _is_tensor(t))

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
