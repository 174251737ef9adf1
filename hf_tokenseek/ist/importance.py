"""How much each layer matters, learned from the loss with sets of layers suppressed."""

import math
from collections.abc import Sequence

import torch

from .config import IstConfig
from .sampling import draw, inclusion_probabilities

# of the running spread of the losses
DECAY = 0.9


class Importance:
    """
    A number for each layer; the larger, the more the loss suffers without it.

    A set whose loss lies below the others' can be spared: its layers lose importance. Method: IST's released code,
    with the opposite sign, which makes the number mean what it is called.

    Args:
        config ([`IstConfig`]): sizes of sets and of updates.
        count (`int`): layers.

    Attributes:
        values (`list[float]`): the importance of each layer, 0 at first.
        spread (`float`, *optional*): running standard deviation of the losses within an update.
    """

    def __init__(self, config: IstConfig, count: int):
        self.config, self.values = config, [0.0] * count
        self.spread: float | None = None

    def chances(self) -> list[float]:
        """Chance of each layer to be suppressed, before sizes are taken care of: sigmoid(-importance)."""
        return [1 / (1 + math.exp(value)) for value in self.values]

    def sets(self, generator: torch.Generator) -> list[list[int]]:
        """The sets of layers to suppress."""
        count = len(self.values)
        size = min(count - 1, max(1, round(self.config.suppressed * count)))
        probabilities = inclusion_probabilities(self.chances(), size)
        pairs = self.config.antithetic
        found = [draw(probabilities, generator) for _ in range(self.config.candidates // (1 + pairs))]
        if not pairs:
            return found
        return [part for own in found for part in (own, [i for i in range(count) if i not in own])]

    def rewards(self, losses: Sequence[float]) -> list[float]:
        """What each set earns; they add up to 0."""
        if self.config.reward == "exp":
            gains = [math.exp(-loss) for loss in losses]
            return [gain - sum(gains) / len(gains) for gain in gains]
        mean = sum(losses) / len(losses)
        below = [mean - loss for loss in losses]
        square = sum(part * part for part in below) / len(below)
        before = square if self.spread is None else self.spread**2
        # losses that are all the same (new adapters) say nothing about the spread
        if square > 0:
            self.spread = math.sqrt(DECAY * before + (1 - DECAY) * square)
        return [part / self.spread if self.spread else 0.0 for part in below]

    def update(self, sets: Sequence[Sequence[int]], losses: Sequence[float]) -> None:
        """
        Learns from the losses with each set suppressed.

        Args:
            sets (`Sequence[Sequence[int]]`): as from [`sets`].
            losses (`Sequence[float]`): the mean loss with each; all ranks hand over the same.
        """
        slopes = [chance * (1 - chance) for chance in self.chances()]
        for layers, reward in zip(sets, self.rewards(losses), strict=True):
            for layer in layers:
                self.values[layer] -= self.config.rate * reward * slopes[layer]

    def state_dict(self) -> dict:
        """All that the coming updates depend on."""
        return {"values": list(self.values), "spread": self.spread}

    def load_state_dict(self, state: dict) -> None:
        """Goes on where [`state_dict`] was taken."""
        self.values, self.spread = list(state["values"]), state["spread"]
