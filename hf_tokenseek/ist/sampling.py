"""Drawing a fixed number of layers with known probabilities."""

from collections.abc import Sequence

import torch


def inclusion_probabilities(weights: Sequence[float], count: int) -> list[float]:
    """
    Probabilities proportional to `weights`, none above 1, that add up to `count`.

    Args:
        weights (`Sequence[float]`): not negative; at least `count` of them positive.
        count (`int`): how many are to be drawn.
    """
    weights = torch.tensor(weights, dtype=torch.float64)
    certain = torch.zeros(len(weights), dtype=torch.bool)
    while True:
        rest = torch.where(certain, 0.0, weights)
        found = torch.where(certain, 1.0, (count - certain.sum()) * rest / rest.sum().clamp(min=1e-300))
        if not (found > 1).any():
            return found.tolist()
        certain |= found >= 1


def draw(probabilities: Sequence[float], generator: torch.Generator) -> list[int]:
    """
    As many indices as the probabilities add up to, ascending and distinct; each is drawn with its own probability.

    Systematic sampling along a random order: equal probabilities give every subset the same chance.
    """
    order = torch.randperm(len(probabilities), generator=generator)
    ends = torch.tensor(probabilities, dtype=torch.float64)[order].cumsum(0)
    count = round(float(ends[-1]))
    # rounding must not push the last point behind the last end
    ends = ends * (count / ends[-1])
    points = torch.arange(count) + torch.rand((), generator=generator, dtype=torch.float64)
    hits = torch.searchsorted(ends, points, right=True).clamp(max=len(order) - 1)
    return sorted(order[hits].tolist())
