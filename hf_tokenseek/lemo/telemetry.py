"""What LeMo kept, in figures for the log and in words."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..means import Means
from .blocks import Blocks, Kept
from .offload import Offload


class Telemetry:
    """Collects figures between two logs; numbers stay on their device until they are read."""

    def __init__(self):
        self._means = Means()

    def kept(self, layer: int, kept: Kept, blocks: Blocks) -> None:
        """A layer has chosen."""
        self._means.add("lemo/kept_share", kept.share)
        if blocks.config.thresholds is not None or isinstance(blocks.config.keep, Sequence):
            self._means.add(f"lemo/kept_share/layer_{layer}", kept.share)

    def offloaded(self, offload: Offload) -> None:
        """A forward pass has moved what its layers keep."""
        self._means.add("lemo/offloaded_mib", sum(offload.moved) / 2**20)

    def probe(self, kept: Kept, blocks: Blocks, scores: Tensor) -> None:
        """
        Compares a choice with what the paper's scores of the same layer say.

        Args:
            kept ([`Kept`]): the choice.
            blocks ([`Blocks`]): that were chosen from.
            scores (`torch.Tensor` of shape `(batch, blocks)`): the paper's.
        """
        scores = scores.masked_fill(~blocks.exists, 0.0)
        mine = chosen(kept, blocks.count)
        order = scores.masked_fill(~blocks.exists, -1.0).argsort(dim=1, descending=True, stable=True).argsort(1)
        best = order < mine.sum(1, keepdim=True)
        self._means.add("lemo/retained_score", (scores * mine).sum() / scores.sum().clamp(min=1e-12))
        self._means.add("lemo/recall", (best & mine).sum() / best.sum().clamp(min=1))

    def read(self, reset: bool = True) -> dict[str, float]:
        """
        The means since the last call with `reset`.

        Returns:
            `dict[str, float]`: `lemo/kept_share`, the share of real tokens that a layer which drops tokens has kept,
            also layer by layer where layers differ (a list in `keep`, thresholds); after probes
            `lemo/retained_score`, the share of the paper's score that the kept blocks have, and `lemo/recall`, which
            share of the blocks it would have kept they are (choosing blindly gives the kept share);
            `lemo/offloaded_mib`, what a micro-batch's layers have moved to the host.
        """
        return self._means.read(reset)


def chosen(kept: Kept, count: int) -> Tensor:
    """`torch.BoolTensor` of shape `(batch, blocks)`: which blocks are kept."""
    at = kept.blocks.masked_fill(kept.blocks < 0, count)
    empty = torch.zeros(len(at), count + 1, dtype=torch.bool, device=at.device)
    return empty.scatter_(1, at, True)[:, :count]
