"""A micro-batch cut into blocks of real tokens, and the choice among them."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..seek.batch import IGNORE, count_tokens, segments_of, targets_of
from .config import LemoConfig

# what comes first when blocks are chosen: sinks and recent ones, labelled ones, the others; never what does not exist
ALWAYS, LABELLED, OTHER, ABSENT = 3, 2, 1, 0


@dataclass(frozen=True)
class Layout:
    """
    What LeMo reads of a micro-batch.

    Args:
        segments (`torch.LongTensor` of shape `(batch, n)`): document numbers, -1 for padding.
        targets (`torch.LongTensor` of shape `(batch, n)`): what each position predicts, -100 for nothing.
        real (`list[int]`): real tokens of each sequence; host numbers.
        labelled (`int`): how many positions predict something; a host number.
        simple (`bool`): one document a sequence without padding on the left, so that causality is the whole rule.
    """

    segments: Tensor
    targets: Tensor
    real: list[int]
    labelled: int
    simple: bool

    @classmethod
    def read(cls, inputs: dict) -> "Layout":
        """
        Reads a model's inputs; waits for the device once.

        Args:
            inputs (`dict`): by name; `labels` may be missing.

        Raises:
            ValueError: the attention mask is not 2-D.
        """
        tokens = inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
        mask, labels = inputs.get("attention_mask"), inputs.get("labels")
        if mask is not None and mask.shape != tokens.shape[:2]:
            raise ValueError(
                f"LeMo reads a 2-D attention mask of shape {tuple(tokens.shape[:2])}, got {tuple(mask.shape)}. Pass "
                "the padding mask; causal, windowed and packed masks follow from positions."
            )
        documents = inputs.get("position_ids"), inputs.get("cu_seq_lens_q")
        segments = segments_of(*tokens.shape[:2], tokens.device, mask, *documents)
        targets = torch.full_like(segments, IGNORE) if labels is None else targets_of(labels, segments)
        real, labelled, simple = count_tokens(segments, targets)
        return cls(segments, targets, real, sum(labelled), simple)


@dataclass(frozen=True)
class Kept:
    """
    What a layer keeps.

    Args:
        blocks (`torch.LongTensor` of shape `(batch, k)`): ascending, -1 behind them.
        rows (`torch.LongTensor` of shape `(batch, k * block)`): positions of their tokens, ascending, -1 behind them.
        share (`torch.Tensor`): of the real tokens, a number on the device.
    """

    blocks: Tensor
    rows: Tensor
    share: Tensor


class Blocks:
    """
    Blocks of a micro-batch: padding is left out before tokens are counted off, so that it is never kept.

    Args:
        segments (`torch.LongTensor` of shape `(batch, n)`): document numbers, -1 for padding.
        targets (`torch.LongTensor` of shape `(batch, n)`): what each position predicts, -100 for nothing.
        real (`list[int]`): real tokens of each sequence; host numbers, from which all sizes follow.
        config ([`LemoConfig`]): size of a block, and which ones come first.

    Packed documents follow one another in a row; a block may hold the end of one and the begin of the next.

    Attributes:
        tokens (`torch.LongTensor` of shape `(batch, blocks, block)`): positions of the tokens, -1 for none.
        documents (`torch.LongTensor` of the same shape): numbers of the documents they are of, -1 for none.
        counts (`list[int]`): blocks of each sequence.
    """

    def __init__(self, segments: Tensor, targets: Tensor, real: list[int], config: LemoConfig):
        self.config, self.segments = config, segments
        self.counts = [-(-count // config.block) for count in real]
        batch, n = segments.shape
        self.count = max(1, *self.counts)
        slots = self.count * config.block
        order = (segments < 0).to(torch.int8).sort(stable=True).indices
        order = order.masked_fill(segments.gather(1, order) < 0, -1)[:, :slots]
        tokens = torch.nn.functional.pad(order, (0, slots - order.shape[1]), value=-1)
        self.tokens = tokens.view(batch, self.count, config.block)
        self.documents = self.at_tokens(segments, -1)
        self.labelled = self.at_tokens(targets != IGNORE, False).any(2)
        self._priority = self._priorities()

    @property
    def exists(self) -> Tensor:
        """`torch.BoolTensor` of shape `(batch, blocks)`: short sequences have fewer."""
        return self.tokens[:, :, 0] >= 0

    @cached_property
    def reach(self) -> tuple[Tensor, Tensor]:
        """
        Two `torch.LongTensor` of shape `(batch, blocks)`: the first block that shares a document with each block, and
        the one behind the last.
        """
        first, last = self._documents_of_blocks()
        return torch.searchsorted(last, first), torch.searchsorted(first, last, right=True)

    def asking(self, queries: str) -> Tensor:
        """
        `torch.BoolTensor` of shape `(batch, blocks)`: whose look at others counts.

        With `queries="labelled"` those that have labels; where none has, as otherwise, all that exist.
        """
        if queries != "labelled":
            return self.exists
        return torch.where(self.labelled.any(1, keepdim=True), self.labelled, self.exists)

    def budgets(self, share: float) -> list[int]:
        """How many blocks of each sequence the share is, rounded down, at least those that are always kept."""
        always = self.config.sinks + self.config.recent
        # 0.29 of 100 are 29, although their product as floats is a little less
        return [min(count, max(1, always, int(share * count * (1 + 1e-12)))) for count in self.counts]

    def choose(self, scores: Tensor, most: float, least: float | None = None, threshold: float = 0.0) -> Kept:
        """
        The blocks with the largest scores, after those that come first.

        With `queries="earlier"` and a threshold those above it are taken as they come, while there is room, so that no
        later block decides about an earlier one.

        Args:
            scores (`torch.Tensor` of shape `(batch, blocks)`): anything where a block does not exist.
            most (`float`): share of the blocks that is kept, at most if there is a threshold.
            least (`float`, *optional*): share that is kept whatever the threshold says; without it there is none.
            threshold (`float`, *optional*): least score, see [`in_means`].
        """
        device, exists = scores.device, self.exists
        budget = torch.tensor(self.budgets(most), device=device)[:, None]
        wanted = None if least is None else (self.in_means(scores) >= threshold) | (self._priority > OTHER)
        in_turn = wanted is not None and self.config.queries == "earlier"
        places = self._in_turn(wanted) if in_turn else self._by_score(scores)
        # a permutation of places, so that no two blocks are alike
        chosen = (self._priority * self.count - places).topk(max(self.budgets(most)), 1).indices
        place = torch.arange(chosen.shape[1], device=device)
        fits = (place < budget) & exists.gather(1, chosen)
        if wanted is not None:
            sure = place < torch.tensor(self.budgets(least), device=device)[:, None]
            fits &= sure | wanted.gather(1, chosen)
        blocks = chosen.masked_fill(~fits, self.count).sort(1).values
        tokens = torch.nn.functional.pad(self.tokens, (0, 0, 0, 1), value=-1)
        rows = tokens.gather(1, blocks[:, :, None].expand(-1, -1, self.config.block)).flatten(1)
        share = (rows >= 0).sum() / (self.tokens >= 0).sum().clamp(min=1)
        return Kept(blocks.masked_fill(blocks == self.count, -1), rows, share)

    def in_means(self, scores: Tensor) -> Tensor:
        """
        Scores in units of their sequence's mean, negative ones as 0; 0 where a block does not exist.

        With `queries="earlier"` the mean is that of the blocks so far, and a score that of one look: later blocks,
        which more of them look at, have no larger ones for it.
        """
        scores = scores.float().clamp(min=0).masked_fill(~self.exists, 0.0)
        if self.config.queries == "earlier":
            so_far = torch.arange(1, self.count + 1, device=scores.device)
            scores = scores / so_far
            mean = scores.cumsum(1) / so_far
        else:
            mean = scores.sum(1, keepdim=True) / self.exists.sum(1, keepdim=True).clamp(min=1)
        return scores / mean.clamp(min=torch.finfo(torch.float32).tiny)

    def _by_score(self, scores: Tensor) -> Tensor:
        """The place of each block when the largest score comes first, then the lower index, `(batch, blocks)`."""
        scores = scores.float().masked_fill(~self.exists, float("-inf"))
        return scores.argsort(dim=1, descending=True, stable=True).argsort(1)

    def _in_turn(self, wanted: Tensor) -> Tensor:
        """
        The place of each block when wanted ones come first, in their order, then the others, from the last one back.

        So a wanted block is taken if those before it have left room, and another one if all that come behind it would
        be too few.
        """
        index = torch.arange(self.count, device=wanted.device)
        return torch.where(wanted, index, 2 * self.count - index).argsort(1).argsort(1)

    def at_tokens(self, values: Tensor, fill) -> Tensor:
        """One value a position `(batch, n)` where the blocks' tokens stand, `(batch, blocks, block)`."""
        found = values.gather(1, self.tokens.flatten(1).clamp(min=0)).view_as(self.tokens)
        return found.masked_fill(self.tokens < 0, fill)

    def _documents_of_blocks(self) -> tuple[Tensor, Tensor]:
        """The first and the last document of each block, `(batch, blocks)`, ascending also where there is none."""
        beyond = self.segments.shape[1]
        first, last = self.documents[:, :, 0], self.documents.amax(2)
        return tuple(own.masked_fill(~self.exists, beyond).contiguous() for own in (first, last))

    def _priorities(self) -> Tensor:
        priority = torch.full_like(self.labelled, OTHER, dtype=torch.long)
        if self.config.labelled:
            # where all blocks have labels these tell none apart, and a threshold has to be able to
            tell = (self.labelled != self.exists).any(1, keepdim=True)
            priority = priority.masked_fill(self.labelled & tell, LABELLED)
        return priority.masked_fill(self._at_edges(), ALWAYS).masked_fill(~self.exists, ABSENT)

    def _at_edges(self) -> Tensor:
        """Which blocks are among the first `sinks` or the last `recent` ones of a document, `(batch, blocks)`."""
        flat = self.documents.flatten(1)
        changes = flat[:, 1:] != flat[:, :-1]
        begins, ends = (
            (torch.nn.functional.pad(changes, side, value=True) & (flat >= 0)).view_as(self.documents).any(2)
            for side in ((1, 0), (0, 1))
        )
        first, last = self._documents_of_blocks()
        edges = begins & (self.config.sinks > 0) | ends & (self.config.recent > 0)
        # the document that begins last in a block reaches furthest behind it; likewise back from an end
        for steps in range(1, min(self.config.sinks, self.count)):
            edges[:, steps:] |= begins[:, :-steps] & (last[:, :-steps] == first[:, steps:])
        for steps in range(1, min(self.config.recent, self.count)):
            edges[:, :-steps] |= ends[:, steps:] & (first[:, steps:] == last[:, :-steps])
        return edges
