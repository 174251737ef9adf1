"""Every score in one interface: what it asks of the scouting pass, and how that becomes one number a position."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenseek_kernels import HeadStatistics

from .batch import Batch
from .config import SeekConfig
from .select import real_rows


@dataclass
class Scouted:
    """
    What the scouting pass found.

    Args:
        mass (`torch.FloatTensor` of shape `(batch, n)`, *optional*): attention received, over heads (and layers).
        head (`HeadStatistics`, *optional*): loss, entropy, gradient norm of every position, each `(batch, n)`.
        block_gradient (`torch.FloatTensor` of shape `(batch, n, hidden)`, *optional*): gradient at the input of the
            last block.
        heads (`int`): attention heads, to turn a sum over heads into a mean.
    """

    mass: Tensor | None = None
    head: HeadStatistics | None = None
    block_gradient: Tensor | None = None
    heads: int = 1

    def terms(self) -> dict[str, Tensor]:
        """What a score may be made of, as far as it was found, by a name for readers; each `(batch, n)`."""
        found = {"attention mass": self.mass}
        if self.head is not None:
            found |= {"loss": self.head.loss, "entropy": self.head.entropy, "gradient norm": self.head.gradient_norm}
        if self.block_gradient is not None:
            found["gradient norm in the last block"] = self.block_gradient.float().norm(dim=-1)
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class Score:
    """
    A way to score positions.

    Args:
        compute (`Callable`): `(scouted, batch, config, generator) -> (batch, n)`.
        mass_from (`str`, *optional*): whose attention is collected, `"labelled"` or `"all"` queries.
        last_block (`bool`): collect attention in the last block only, and the gradient at its input.
        head (`bool`): needs the head's statistics.
    """

    compute: Callable[[Scouted, Batch, SeekConfig, torch.Generator], Tensor]
    mass_from: str | None = None
    last_block: bool = False
    head: bool = False


def uniform_mass(batch: Batch, kind: str) -> Tensor:
    """
    What uniform causal attention would give each position, as a divisor: the number of queries that see it (`"count"`)
    or the sum of `1 / (keys the query sees)` over them (`"harmonic"`). Ones on padding. Shape `(batch, n)`.
    """
    real = batch.segments >= 0
    document = batch.segments.clamp(min=0)
    lengths = torch.zeros_like(document).scatter_add_(1, document, real.long())
    before = lengths.cumsum(1) - lengths
    rank = real.long().cumsum(1) - before.gather(1, document)  # 1 for a document's first token
    length = lengths.gather(1, document)
    if kind == "count":
        divisor = (length - rank + 1).float()
    else:
        reciprocals = 1 / torch.arange(1, batch.shape[1] + 1, device=real.device, dtype=torch.float64)
        harmonic = torch.nn.functional.pad(reciprocals.cumsum(0), (1, 0))
        divisor = (harmonic[length] - harmonic[(rank - 1).clamp(min=0)]).float()
    return torch.where(real, divisor, 1.0)


def _context(scouted, batch, config, generator):
    return scouted.mass if config.context_bias == "none" else scouted.mass / uniform_mass(batch, config.context_bias)


def _hybrid(scouted, batch, config, generator):
    context, gradient = _context(scouted, batch, config, generator), scouted.head.gradient_norm
    normalise = _ranked if config.mix == "rank" else _standardised
    return config.alpha * normalise(context, batch) + config.beta * normalise(gradient, batch)


def _paper(scouted, batch, config, generator):
    received = _context(scouted, batch, config, generator) / scouted.heads
    gradient = scouted.block_gradient.float()
    norms = {
        "l2": lambda g: g.norm(dim=-1),
        "l1": lambda g: g.abs().sum(-1),
        "signed": lambda g: g.sum(-1),
    }
    return config.alpha * received.clamp(min=1e-12).log() + config.beta * _min_max(
        norms[config.gradient_norm](gradient), batch
    )


def _ranked(values: Tensor, batch: Batch) -> Tensor:
    """
    1 for the largest real value of a sequence, down to 1 / n_real. Equal values rank alike: where a term says nothing,
    as the gradient of positions without a label, it decides nothing.
    """
    real = batch.segments >= 0
    values = values.masked_fill(~real, float("-inf"))
    larger = values.shape[1] - torch.searchsorted(values.sort(1).values, values, right=True)
    count = real.sum(1, keepdim=True).clamp(min=1)
    return (count - larger) / count


def _standardised(values: Tensor, batch: Batch) -> Tensor:
    real = (batch.segments >= 0).float()
    count = real.sum(1, keepdim=True).clamp(min=1)
    centred = values - (values * real).sum(1, keepdim=True) / count
    return centred / ((centred.square() * real).sum(1, keepdim=True) / count).sqrt().clamp(min=1e-12)


def _min_max(values: Tensor, batch: Batch) -> Tensor:
    """To [0, 1] over the real positions of a sequence; 0 where all are equal."""
    pad = batch.segments < 0
    low = values.masked_fill(pad, float("inf")).amin(1, keepdim=True)
    high = values.masked_fill(pad, float("-inf")).amax(1, keepdim=True)
    return (values - low) / (high - low).clamp(min=torch.finfo(values.dtype).tiny)


def _recent(scouted, batch, config, generator):
    return real_rows(batch).float()


def _random(scouted, batch, config, generator):
    return torch.rand(batch.shape, generator=generator).to(batch.targets.device)


SCORE_FUNCTIONS: dict[str, Score] = {
    "evidence": Score(lambda scouted, *_: scouted.mass, mass_from="labelled"),
    "context": Score(_context, mass_from="all"),
    "gradient": Score(lambda scouted, *_: scouted.head.gradient_norm, head=True),
    "loss": Score(lambda scouted, *_: scouted.head.loss, head=True),
    "entropy": Score(lambda scouted, *_: scouted.head.entropy, head=True),
    "recent": Score(_recent),
    "random": Score(_random),
    "hybrid": Score(_hybrid, mass_from="all", head=True),
    "paper": Score(_paper, mass_from="all", last_block=True),
}
