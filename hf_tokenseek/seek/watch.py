"""What becomes of a few sequences each time they are trained on, and where the selected tokens stand."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .batch import Batch
from .metrics import Trained
from .select import DITCHED, EVIDENCE, LOSS

BINS = 20
# odd constants of a multiplicative hash; products wrap around, as int64 does
_HASH_TOKEN, _HASH_PLACE, _HASH_MIX = 0x2545F4914F6CDD1D, 0x1D8E4E27C47D124F, 0x5851F42D4C957F2D


@dataclass
class Visit:
    """
    One sequence in one micro-batch, without its padding.

    Args:
        step (`int`): optimizer step, from 1.
        tokens (`list[int]`): token ids.
        kinds (`list[int]`): [`DITCHED`], [`EVIDENCE`] or [`LOSS`], token by token.
        scores (`list[float]`, *optional*): what decided; `None` where all was trained plainly.
        terms (`dict[str, list[float]]`): what the score was made of.
    """

    step: int
    tokens: list[int]
    kinds: list[int]
    scores: list[float] | None
    terms: dict[str, list[float]]


class SampleWatch:
    """
    Follows the first few sequences that are trained on, and knows them again by their tokens when they come back.

    Observing takes some 60 small operations and waits for no device: the latest visit of each sequence stays
    there, 24 bytes a token and 4 for the score and each of its terms, until it is read.

    Args:
        count (`int`): how many sequences.
        known (`list[list[int]]`, *optional*): token ids of those that are followed already.
    """

    def __init__(self, count: int, known: list[list[int]] | None = None):
        self.count, self._known = count, (known or [])[:count]
        self._names: list[str] = []
        # one row a watched sequence: its fingerprint; the step of a visit that was not read yet, below 0 if it was
        # trained plainly; tokens, kinds, and what is real; score and terms
        self._prints: Tensor | None = None
        self._steps: Tensor | None = None
        self._integers: Tensor | None = None
        self._floats: Tensor | None = None

    def observe(self, batch: Batch, done: Trained, step: int) -> None:
        """Keeps what happened to the watched sequences among those of `batch`, in optimizer step `step`."""
        if batch.tokens.dim() != 2:
            return  # embeddings have no names
        real, order = _to_the_left(batch.segments >= 0)
        tokens = batch.tokens.gather(1, order)
        prints = fingerprints(tokens, real)
        self._prints = self._watched(prints)
        same = self._prints[:, None] == prints
        hit, source = same.any(1), same.int().argmax(1)
        kinds = done.selection.kinds(batch.shape[1]).gather(1, order)
        integers = torch.stack([tokens, kinds, real.long()], 1)
        self._integers = _replaced(self._integers, integers[source], hit)
        self._steps = _replaced(self._steps, torch.full_like(source, -step if done.plainly else step), hit)
        if not done.plainly:
            terms = done.scouted.terms()
            self._names = list(terms)
            floats = torch.stack([done.scores, *terms.values()], 1).float()
            floats = floats.gather(2, order[:, None].expand(-1, floats.shape[1], -1))
            self._floats = _replaced(self._floats, floats[source], hit)

    def read(self) -> list[Visit]:
        """The latest visit of each sequence that was visited since the last call; waits for the device."""
        if self._steps is None:
            return []
        steps, integers = self._steps.tolist(), self._integers.cpu()
        floats = None if self._floats is None else self._floats.cpu()
        self._steps = torch.zeros_like(self._steps)
        found = {}
        for place, step in enumerate(steps):
            if step:
                visit = self._visit(abs(step), integers[place], floats[place] if step > 0 else None)
                # a sequence that came back while places were free has taken a second one
                found.setdefault(tuple(visit.tokens), visit)
        return list(found.values())

    def _visit(self, step: int, integers: Tensor, floats: Tensor | None) -> Visit:
        length = int(integers[2].sum())
        tokens, kinds, _ = integers[:, :length].tolist()
        if floats is None:
            return Visit(step, tokens, kinds, None, {})
        scores, *terms = floats[:, :length].tolist()
        return Visit(step, tokens, kinds, scores, dict(zip(self._names, terms, strict=True)))

    def _watched(self, prints: Tensor) -> Tensor:
        """The watched fingerprints; the first sequences that come along take the free places."""
        if self._prints is None:
            rows = [torch.tensor([ids], device=prints.device) for ids in self._known]
            known = [fingerprints(row, torch.ones_like(row, dtype=torch.bool)) for row in rows]
            self._prints = torch.cat([*known, prints[:0]])
        return torch.cat([self._prints, prints[: self.count - len(self._prints)]])


class PositionHistogram:
    """
    Counts ditched, evidence and loss tokens by their place between a sequence's first and last token.

    Args:
        bins (`int`, *optional*, defaults to 20): how many places.
    """

    def __init__(self, bins: int = BINS):
        self.bins = bins
        self._counts: Tensor | None = None

    def observe(self, batch: Batch, done: Trained) -> None:
        """Adds a micro-batch; what was trained plainly says nothing about a selection and is left out."""
        if done.plainly:
            return
        real = (batch.segments >= 0).long()
        place = ((real.cumsum(1) - 1).clamp(min=0) * self.bins) // real.sum(1, keepdim=True).clamp(min=1)
        index = (done.selection.kinds(batch.shape[1]) * self.bins + place).flatten()
        if self._counts is None:
            self._counts = torch.zeros(3 * self.bins, dtype=torch.long, device=real.device)
        # whole numbers in one dimension: the sum is the same in whatever order it is made
        self._counts.scatter_add_(0, index, real.flatten())

    def read(self) -> dict[str, list[int]] | None:
        """Counts by kind since the last call, `None` where nothing was selected; waits for the device."""
        if self._counts is None:
            return None
        counts, self._counts = self._counts.view(3, self.bins).tolist(), None
        return {"ditched": counts[DITCHED], "evidence": counts[EVIDENCE], "loss": counts[LOSS]}


def fingerprints(tokens: Tensor, real: Tensor) -> Tensor:
    """
    A number for each sequence that follows from its real tokens and their order alone; equal tokens, equal numbers.

    Args:
        tokens (`torch.LongTensor` of shape `(batch, n)`): token ids, real ones first.
        real (`torch.BoolTensor` of shape `(batch, n)`): which are real.
    """
    place = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    mixed = (tokens + 1) * _HASH_TOKEN + place * _HASH_PLACE
    mixed = (mixed ^ (mixed >> 29)) * _HASH_MIX
    return ((mixed ^ (mixed >> 32)) * real).sum(1)


def _to_the_left(real: Tensor) -> tuple[Tensor, Tensor]:
    """Real tokens first: which places are real then, and where they come from."""
    order = (~real).to(torch.int8).sort(stable=True).indices
    return real.gather(1, order), order


def _replaced(old: Tensor | None, new: Tensor, hit: Tensor) -> Tensor:
    """`new` in the rows of `hit`, `old` in the others; `old` may have fewer rows, either may be narrower."""
    old = new[:0] if old is None else old
    if new.dim() > 1:
        width = max(old.shape[-1], new.shape[-1])
        old, new = (F.pad(part, (0, width - part.shape[-1])) for part in (old, new))
    old = torch.cat([old, torch.zeros_like(new[len(old) :])])
    return torch.where(hit.view(-1, *[1] * (new.dim() - 1)), new, old)
