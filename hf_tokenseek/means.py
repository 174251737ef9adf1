"""Figures that are collected on their device until somebody reads them."""

import torch
from torch import Tensor


class Means:
    """
    Means of figures since they were last read. What has been added takes the memory of two numbers a name, whether it
    is ever read or not, and no device is waited for before.
    """

    def __init__(self):
        self._found: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, name: str, value: float | Tensor) -> None:
        """
        Adds a figure; what is not a number does not count.

        Args:
            name (`str`): what it is of.
            value (`float` or `torch.Tensor` of shape `()`): the figure.
        """
        value = torch.as_tensor(value, dtype=torch.float64).detach()
        counts = ~value.isnan()
        own = torch.where(counts, value, 0.0), counts.double()
        self._found[name] = own if name not in self._found else tuple(map(torch.add, self._found[name], own))

    def read(self, reset: bool = True) -> dict[str, float]:
        """
        The means of everything that has been added since the last call with `reset`; waits for the device.

        Args:
            reset (`bool`, *optional*, defaults to `True`): whether the next call starts from here.
        """
        found = {name: (total.item(), count.item()) for name, (total, count) in self._found.items()}
        if reset:
            self._found.clear()
        return {name: total / count for name, (total, count) in found.items() if count}
