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

    def bytes(self) -> int:
        """Of all tensors in the optimizer's state."""
        return sum(t.nbytes for state in self.optimizer.state.values() for t in state.values() if _is_tensor(t))


def _moved(state: dict, device: torch.device) -> dict:
    # AdamW that is not fused keeps its step counts on the CPU
    return {
        name: value.to(device) if _is_tensor(value) and value.numel() > 1 else value for name, value in state.items()
    }


def _is_tensor(value) -> bool:
    return isinstance(value, Tensor)
