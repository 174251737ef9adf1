"""A share of blocks for each layer: so that all layers lose the same share of their score."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .config import LemoConfig
from .recording import oracle_scores, recording

# shares that a layer's loss is known at, by interpolation of what is between its blocks
_GRID = 200
_BISECTIONS = 60


def calibrate(model: nn.Module, batches: Iterable[dict], config: LemoConfig, progress: bool = True) -> LemoConfig:
    """
    Spreads `config.keep` over the layers that drop tokens.

    Layers whose score is spread evenly keep more blocks than layers where a few have it all: the share of the score
    that is lost is the same in each of them, and the mean share of blocks is `config.keep`.

    Args:
        model (`nn.Module`): a supported causal language model; it runs as it is, without gradient.
        batches (`Iterable[dict]`): some micro-batches, each with `input_ids`, as the model is trained with.
        config ([`LemoConfig`]): `keep` is one number.
        progress (`bool`, *optional*, defaults to `True`): whether to show a bar.

    Returns:
        [`LemoConfig`]: the same with one share a layer in `keep`.

    Raises:
        ValueError: `keep` is a list already or 1, or there are no batches.
    """
    if not isinstance(config.keep, float | int):
        raise ValueError(f"calibrate() spreads one share over the layers, got keep={config.keep!r}.")
    if config.keep == 1:
        raise ValueError("calibrate() got keep=1, with which no layer drops anything. Set a share below 1.")
    with recording(model):
        curves = [
            torch.stack([lost_shares(scores, blocks.exists) for scores in layers])
            for layers, blocks in (
                oracle_scores(model, inputs, config) for inputs in tqdm(batches, "calibrating", disable=not progress)
            )
        ]
    if not curves:
        raise ValueError("calibrate() got no batches. Pass some of those that the model is to be trained with.")
    shares = config.shares(curves[0].shape[0])
    dropping = [layer for layer, share in enumerate(shares) if share < 1]
    found = equal_loss(torch.stack(curves).mean(0)[dropping], config.keep)
    for layer, share in zip(dropping, found, strict=True):
        shares[layer] = share
    return replace(config, keep=shares)


def lost_shares(scores: Tensor, exists: Tensor) -> Tensor:
    """
    The share of a layer's score that is lost with the worst blocks, at evenly spaced shares of blocks kept, 0 to 1.

    Args:
        scores (`torch.Tensor` of shape `(batch, blocks)`): not negative.
        exists (`torch.BoolTensor` of shape `(batch, blocks)`): blocks of short sequences do not.

    Returns:
        `torch.Tensor` of shape `(grid,)`: falls from 1 to 0; the mean over the batch.
    """
    curves = []
    grid = torch.linspace(0, 1, _GRID + 1, dtype=torch.float64)
    for own, there in zip(scores.double().cpu(), exists.cpu(), strict=True):
        best = own[there].sort(descending=True).values
        kept = torch.cat([best.new_zeros(1), best.cumsum(0)]) / best.sum().clamp(min=1e-300)
        place = grid * len(best)
        low = place.floor().long().clamp(max=len(best) - 1)
        curves.append(1 - torch.lerp(kept[low], kept[low + 1], place - low))
    return torch.stack(curves).mean(0)


def equal_loss(curves: Tensor, mean: float) -> list[float]:
    """
    The share of blocks for each layer at which all of them lose the same, and whose mean is `mean`.

    Args:
        curves (`torch.Tensor` of shape `(layers, grid)`): from [`lost_shares`].
        mean (`float`): of the shares.
    """
    lost_least, lost_most = 0.0, 1.0
    for _ in range(_BISECTIONS):
        lost = (lost_least + lost_most) / 2
        shares = _shares_at(curves, lost)
        if sum(shares) / len(shares) > mean:
            lost_least = lost
        else:
            lost_most = lost
    # exactly, whatever the grid, and also where nothing is left to lose
    found = sum(shares) / len(shares)
    if found > mean:
        return [share * mean / found for share in shares]
    return [1 - (1 - share) * (1 - mean) / (1 - found) for share in shares]


def _shares_at(curves: Tensor, lost: float) -> list[float]:
    """The smallest share of blocks at which a layer loses no more than `lost`."""
    grid = curves.shape[1] - 1
    shares = []
    for curve in curves:
        above = int((curve > lost).sum())
        left, right = curve[max(above - 1, 0)].item(), curve[min(above, grid)].item()
        part = (left - lost) / (left - right) if left > right else 1.0
        shares.append(min(1.0, max(1e-3, (above - 1 + part) / grid)))
    return shares
