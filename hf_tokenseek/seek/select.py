"""From scores to rows: fixed-size, sorted, ties to the lower index, padding never; no `nonzero`, no boolean index."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .batch import IGNORE, Batch
from .config import SeekConfig

# what becomes of a position
DITCHED, EVIDENCE, LOSS = 0, 1, 2


@dataclass
class Selection:
    """
    The selected rows of one micro-batch.

    Args:
        rows (`torch.LongTensor` of shape `(batch, k)`): selected positions, ascending; -1 fills up behind them.
        targets (`torch.LongTensor` of shape `(batch, k)`): what each row predicts; -100 for evidence and empty slots.
        weights (`torch.FloatTensor` of shape `(batch, k)`): factor on each row's loss.
    """

    rows: Tensor
    targets: Tensor
    weights: Tensor

    def kinds(self, n: int) -> Tensor:
        """`(batch, n)`: [`DITCHED`], [`EVIDENCE`] or [`LOSS`], position by position."""
        kinds = torch.where(self.targets == IGNORE, EVIDENCE, LOSS).float() * (self.rows >= 0)
        empty = kinds.new_zeros(len(kinds), n)
        return empty.scatter_reduce(1, self.rows.clamp(min=0), kinds, "amax").long()


def select(scores: Tensor, batch: Batch, config: SeekConfig, generator: torch.Generator | None = None) -> Selection:
    """
    Selects rows by score, each sequence on its own.

    Args:
        scores (`torch.FloatTensor` of shape `(batch, n)`):
            Importance of every position; what stands at padding does not matter.
        batch ([`Batch`]):
            The micro-batch with the sizes of the selection.
        config ([`SeekConfig`]):
            With `ratio` one budget is spent on all positions, by the score `"evidence"` on labelled ones first;
            without, loss rows and evidence rows have budgets of their own. `temperature` makes the choice stochastic.
        generator (`torch.Generator`, *optional*):
            CPU generator of the stochastic choice.
    """
    real, labelled = batch.segments >= 0, batch.targets != IGNORE
    keys, inclusion = _sampling_keys(scores, config, generator)
    loss_sizes, evidence_sizes = (_column(s, scores) for s in (batch.sizes.loss, batch.sizes.evidence))
    # evidence is of labels: without them there is nothing to train
    if config.ratio is not None and config.score != "evidence":
        budget = loss_sizes + evidence_sizes
        chosen = _top(keys, real, budget)
        is_loss = chosen & labelled
        share = inclusion(keys, real, budget)
    else:
        is_loss = _top(keys, labelled, loss_sizes)
        chosen = is_loss | _top(keys, real & ~is_loss, evidence_sizes)
        share = inclusion(keys, labelled, loss_sizes)
    n = scores.shape[1]
    positions = torch.arange(n, device=scores.device)
    rows = torch.where(chosen, positions, n).sort(1).values[:, : batch.sizes.rows]
    rows = rows.masked_fill(rows == n, -1)
    index = rows.clamp(min=0)
    counts = is_loss.sum(1, keepdim=True)
    # without sampling, a sequence's kept losses stand for all of its losses
    weights = labelled.sum(1, keepdim=True) / counts.clamp(min=1) if share is None else 1 / share
    keep = is_loss.gather(1, index) & (rows >= 0)
    targets = torch.where(keep, batch.targets.gather(1, index), IGNORE)
    # what no loss is multiplied with may be anything, also infinite
    weights = torch.where(keep, weights.expand(scores.shape).gather(1, index), 1.0)
    return Selection(rows, targets, weights.float())


def labelled_rows(batch: Batch, most: int) -> Tensor:
    """
    `(batch, m)`: the labelled positions of each sequence, ascending, -1 behind them; `m` is the largest count. Where a
    sequence has more than `most`, so many of them, evenly spaced.
    """
    n, device = batch.shape[1], batch.targets.device
    positions = torch.where(batch.targets != IGNORE, torch.arange(n, device=device), n).sort(1).values
    counts = _column(batch.sizes.labelled, positions)
    slots = torch.arange(max(1, min(most, max(batch.sizes.labelled))), device=device)
    picks = torch.where(counts > most, slots * counts // most, slots)
    rows = positions.gather(1, picks.clamp(max=n - 1))
    return rows.masked_fill((rows == n) | (slots >= counts), -1)


def real_rows(batch: Batch) -> Tensor:
    """`(batch, n)`: every real position, -1 on padding."""
    positions = torch.arange(batch.shape[1], device=batch.targets.device).expand(batch.shape)
    return positions.masked_fill(batch.segments < 0, -1)


def descending_ranks(values: Tensor) -> Tensor:
    """Rank of each value in its row, 0 for the largest; among equals the lower index comes first."""
    order = values.sort(dim=1, descending=True, stable=True).indices
    ranks = torch.arange(values.shape[1], device=values.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, ranks)


def _top(keys: Tensor, allowed: Tensor, sizes: Tensor) -> Tensor:
    """Mask of the `sizes` largest allowed keys of each row."""
    return (descending_ranks(keys.masked_fill(~allowed, float("-inf"))) < sizes) & allowed


def _column(sizes: list[int], like: Tensor) -> Tensor:
    return torch.tensor(sizes, device=like.device)[:, None]


def _sampling_keys(scores: Tensor, config: SeekConfig, generator: torch.Generator | None):
    """
    The keys to rank, and a function that gives the inclusion probability of each position.

    Gumbel noise on `log(weight) / temperature` samples without replacement in proportion to the weights; given the
    first key that is left out (`kappa`), a position is included with probability `1 - exp(-exp(phi - kappa))`, and
    weighting by its inverse is unbiased (Kool et al. 2019, https://huggingface.co/papers/1903.06059).
    """
    scores = scores.float().nan_to_num(nan=0.0, neginf=torch.finfo(torch.float32).min)
    if config.temperature == 0:
        return scores, lambda keys, allowed, sizes: None
    # mass, norms, losses and entropies are weights already; the others are on a log scale
    weights = config.score in ("evidence", "context", "gradient", "loss", "entropy")
    # finite, so that two infinite scores do not leave NaN as their difference
    phi = ((scores.clamp(min=1e-12).log() if weights else scores) / config.temperature).clamp(-1e30, 1e30)
    uniform = torch.rand(scores.shape, generator=generator).clamp(min=1e-12, max=1 - 1e-7)
    keys = phi - torch.log(-uniform.log()).to(scores.device)

    def inclusion(keys: Tensor, allowed: Tensor, sizes: Tensor) -> Tensor:
        masked = keys.masked_fill(~allowed, float("-inf"))
        beyond = (descending_ranks(masked) == sizes) & allowed
        # nothing is left out: kappa is -inf and every position is certain
        kappa = torch.where(beyond, masked, float("-inf")).amax(1, keepdim=True)
        return -torch.expm1(-torch.exp((phi - kappa).clamp(max=80.0)))

    return keys, inclusion
