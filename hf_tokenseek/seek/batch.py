"""What one micro-batch looks like to TokenSeek: targets, documents, positions, and the sizes of its selection."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import SeekConfig

IGNORE = -100


@dataclass
class Sizes:
    """
    How many rows each sequence selects: host integers that follow from labels and mask alone.

    Args:
        real (`list[int]`): real (not padded) tokens of each sequence.
        labelled (`list[int]`): positions of each sequence whose next token is a label.
        simple (`bool`): one document a sequence and no padding on the left, so that causality is the whole rule.
        loss (`list[int]`): loss rows to select (an upper bound under `ratio`).
        evidence (`list[int]`): evidence rows to select (under `ratio`: the whole budget is `loss` + `evidence`).
    """

    real: list[int]
    labelled: list[int]
    simple: bool
    loss: list[int]
    evidence: list[int]

    @classmethod
    def plan(cls, real: list[int], labelled: list[int], simple: bool, config: SeekConfig) -> "Sizes":
        """Applies the shares of `config` to the counted tokens."""
        config = config.resolved()
        if config.ratio is not None:
            budget = [_share(config.ratio, r) for r in real]
            loss = [min(b, n) for b, n in zip(budget, labelled, strict=True)]
            return cls(real, labelled, simple, loss, [b - n for b, n in zip(budget, loss, strict=True)])
        loss = [_share(config.labelled, n) for n in labelled]
        evidence = [_share(config.context, r - n) for r, n in zip(real, loss, strict=True)]
        return cls(real, labelled, simple, loss, evidence)

    @property
    def rows(self) -> int:
        """Rows a sequence of the batch takes: the largest selection, at least one."""
        return max(1, *(a + b for a, b in zip(self.loss, self.evidence, strict=True)))


@dataclass
class Batch:
    """
    One micro-batch, prepared for scouting.

    Args:
        tokens (`torch.Tensor`): `input_ids` of shape `(batch, n)`, or `inputs_embeds` of shape `(batch, n, hidden)`.
        positions (`torch.LongTensor` of shape `(batch, n)`): position ids, as the plain model would use them.
        segments (`torch.LongTensor` of shape `(batch, n)`): document number, -1 for padding.
        targets (`torch.LongTensor` of shape `(batch, n)`): the label that position `i` predicts (`labels[i + 1]`),
            -100 where there is none and on padding.
        sizes (`Sizes`): the sizes of the selection.
        lemo ([`Elimination`], *optional*): which tokens the layers run on, if not on all.
    """

    tokens: Tensor
    positions: Tensor
    segments: Tensor
    targets: Tensor
    sizes: Sizes
    lemo: Any = None

    @property
    def shape(self) -> tuple[int, int]:
        """`(batch, n)`."""
        return tuple(self.targets.shape)

    @property
    def lemo_inputs(self) -> dict:
        """LeMo's keyword for the backbone; without LeMo none, which layers would hand down to their attention."""
        return {} if self.lemo is None else {"lemo": self.lemo}

    def computed(self) -> "Batch":
        """The same batch with tokens that have missed a layer as padding: nothing can be trained through them."""
        if self.lemo is None:
            return self
        missed = ~self.lemo.computed()
        return replace(
            self,
            segments=self.segments.masked_fill(missed, -1),
            targets=self.targets.masked_fill(missed, IGNORE),
        )

    @property
    def visibility(self) -> Tensor | None:
        """`segments` where they restrict attention; `None` where causality is the whole rule."""
        return None if self.sizes.simple else self.segments


def prepare(
    config: SeekConfig,
    tokens: Tensor,
    labels: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens: Tensor | None = None,
    positions_from_mask: bool = False,
    sizes: Sizes | None = None,
) -> Batch:
    """
    Builds the [`Batch`]; reads its sizes from the device once (not at all if `sizes` are given).

    Args:
        config ([`SeekConfig`]): the shares to apply.
        tokens (`torch.Tensor`): input ids `(batch, n)` or embeddings `(batch, n, hidden)`.
        labels (`torch.LongTensor` of shape `(batch, n)`): not yet shifted, -100 where there is no loss.
        attention_mask (`torch.Tensor` of shape `(batch, n)`, *optional*): 0 on padding.
        position_ids (`torch.LongTensor` of shape `(batch, n)`, *optional*): without a mask, a jump starts a document.
        cu_seq_lens (`torch.IntTensor` of shape `(documents + 1,)`, *optional*): document limits of a batch of one.
        positions_from_mask (`bool`, *optional*, defaults to `False`): the model counts positions by the mask (OPT).
        sizes ([`Sizes`], *optional*): planned beforehand, e.g. under fake tensors.

    Raises:
        ValueError: the mask is not 2-D, shapes do not fit, or `cu_seq_lens` come with several sequences.
    """
    batch, n = tokens.shape[:2]
    if labels.shape != (batch, n):
        raise ValueError(f"`labels` {tuple(labels.shape)} should have the inputs' shape {(batch, n)}.")
    if attention_mask is not None and attention_mask.shape != (batch, n):
        raise ValueError(
            f"TokenSeek reads a 2-D attention mask of shape {(batch, n)}, got {tuple(attention_mask.shape)}. "
            "Pass the padding mask; causal, windowed and packed masks follow from positions."
        )
    if cu_seq_lens is not None and batch > 1:
        raise ValueError(
            f"`cu_seq_lens_q` limits the documents of one packed sequence, got it with a batch of {batch}. Flatten "
            "the batch to one sequence, or mark documents by position_ids."
        )
    segments = segments_of(batch, n, tokens.device, attention_mask, position_ids, cu_seq_lens)
    if position_ids is None:
        position_ids = torch.arange(n, device=tokens.device).expand(batch, n)
        if positions_from_mask and attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(1) * attention_mask - 1).long()
    targets = targets_of(labels, segments)
    if sizes is None:
        sizes = Sizes.plan(*count_tokens(segments, targets), config)
    return Batch(tokens, position_ids.expand(batch, n), segments, targets, sizes)


def _share(share: float, count: int) -> int:
    """So many of `count`, rounded up. 0.07 of 100 are 7, although their product as floats is a little more."""
    return math.ceil(share * count * (1 - 1e-12))


def segments_of(
    batch: int,
    n: int,
    device: torch.device,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens: Tensor | None = None,
) -> Tensor:
    """The document that each token belongs to, -1 for padding; arguments as in [`prepare`]. Shape `(batch, n)`."""
    if cu_seq_lens is not None:
        # tokens behind the last document are padding
        own = torch.bucketize(torch.arange(n, device=device), cu_seq_lens.to(device).long(), right=True) - 1
        return own.masked_fill(own >= cu_seq_lens.numel() - 1, -1).expand(batch, n)
    if attention_mask is not None:
        return torch.where(attention_mask.bool(), 0, -1)
    if position_ids is not None:
        # the rule of transformers: where positions do not grow by one, a new document begins
        return F.pad((position_ids.diff(dim=1) != 1).long().cumsum(1), (1, 0)).expand(batch, n)
    return torch.zeros(batch, n, dtype=torch.long, device=device)


def targets_of(labels: Tensor, segments: Tensor) -> Tensor:
    """The label that each position predicts, -100 where there is none and on padding. Shape `(batch, n)`."""
    return F.pad(labels, (0, 1), value=IGNORE)[:, 1:].masked_fill(segments < 0, IGNORE)


_known: tuple[list[int], list[int], bool] | None = None


@contextmanager
def known_counts(real: list[int], labelled: list[int], simple: bool = True) -> Iterator[None]:
    """Inside the block [`count_tokens`] returns this without looking: fake tensors hold no numbers to count."""
    global _known
    before, _known = _known, (real, labelled, simple)
    try:
        yield
    finally:
        _known = before


def count_tokens(segments: Tensor, targets: Tensor) -> tuple[list[int], list[int], bool]:
    """Real and labelled tokens a sequence, and whether causality is the whole rule; waits for the device once."""
    if _known is not None:
        return _known
    counts = torch.stack([(segments >= 0).sum(1), (targets != IGNORE).sum(1), _is_simple(segments)], 1).tolist()
    real, labelled, simple = zip(*counts, strict=True)
    return list(real), list(labelled), all(simple)


def _is_simple(segments: Tensor) -> Tensor:
    """Per sequence, 1 if it is one document at the front with padding only behind it."""
    starts_real = segments[:, 0] == 0
    steps = segments.diff(dim=1)
    return (starts_real & ((steps == 0) | (segments[:, 1:] == -1)).all(1)).long()
