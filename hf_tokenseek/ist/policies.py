"""Which layers train in a period: one function of what is known for each policy."""

import torch

from ..seeds import mixed_seed
from .config import LEARNED, IstConfig
from .importance import Importance
from .sampling import draw, inclusion_probabilities

# streams of random numbers
DRAWS, SETS = 0, 1
# how fast the memory of gradients follows
DECAY = 0.5


class Policy:
    """
    Draws the layers of a period.

    All that is random follows from the seed and the step, so ranks that have seen the same numbers, and a run that is
    resumed, draw the same.

    Args:
        config ([`IstConfig`]): how many and how.
        count (`int`): layers.

    Attributes:
        importance ([`Importance`]): what `"ist"` and `"top"` go by.
        norms (`list[float]`): what `"gradient_norm"` goes by; infinite where a layer has not trained yet.
        size (`int`): layers of a period.
        first (`int`): the lowest layer that may train.
    """

    def __init__(self, config: IstConfig, count: int):
        self.config, self.count = config, count
        self.size = min(count, max(1, round(config.layers * count)))
        self.first = min(count - self.size, round(config.lowest * count))
        self.importance = Importance(config, count)
        self.norms = [float("inf")] * count

    @property
    def learns(self) -> bool:
        """Whether layers are suppressed to learn their importance."""
        return self.config.policy in LEARNED and self.size < self.count

    def generator(self, stream: int, step: int) -> torch.Generator:
        """Random numbers of a step."""
        return torch.Generator().manual_seed(mixed_seed(self.config.seed, stream, step))

    def draw(self, step: int) -> tuple[list[int], list[float]]:
        """
        The layers of the period that begins at `step`.

        Returns:
            `(layers, probabilities)`: ascending, and the chance that each of *all* layers had.
        """
        if self.config.policy == "round_robin":
            return self._chosen(self._in_turn(step // self.config.period))
        weights = self._weights()
        if self.config.policy == "top":
            # ties go to the higher layer, which costs less
            ranked = sorted(range(self.first, self.count), key=lambda layer: (weights[layer], layer))
            return self._chosen(sorted(ranked[-self.size :]))
        probabilities = inclusion_probabilities(weights, self.size)
        return draw(probabilities, self.generator(DRAWS, step)), probabilities

    def sets(self, step: int) -> list[list[int]]:
        """The sets of layers to suppress in a step."""
        return self.importance.sets(self.generator(SETS, step))

    def observe_norms(self, norms: dict[int, float]) -> None:
        """Takes the gradient norms of the layers that have trained."""
        for layer, norm in norms.items():
            known = self.norms[layer]
            self.norms[layer] = norm if known == float("inf") else DECAY * known + (1 - DECAY) * norm

    def state_dict(self) -> dict:
        """All that the coming draws depend on, beside the configuration."""
        return {"importance": self.importance.state_dict(), "norms": list(self.norms)}

    def load_state_dict(self, state: dict) -> None:
        """Goes on where [`state_dict`] was taken."""
        self.importance.load_state_dict(state["importance"])
        self.norms = list(state["norms"])

    def _chosen(self, layers: list[int]) -> tuple[list[int], list[float]]:
        return layers, [float(layer in layers) for layer in range(self.count)]

    def _in_turn(self, period: int) -> list[int]:
        allowed = range(self.first, self.count)
        return sorted(allowed[(period * self.size + k) % len(allowed)] for k in range(self.size))

    def _weights(self) -> list[float]:
        """Not negative, 0 below the lowest layer that may train."""
        if self.config.policy in LEARNED:
            # sigmoid(importance)
            weights = [1 - chance for chance in self.importance.chances()]
        elif self.config.policy == "gradient_norm":
            known = [norm for norm in self.norms if norm != float("inf")]
            # who has not trained yet is as likely as the likeliest
            weights = [min(norm, max(known, default=1.0)) + 1e-12 for norm in self.norms]
        else:
            weights = [1.0] * self.count
        return [weight if layer >= self.first else 0.0 for layer, weight in enumerate(weights)]
