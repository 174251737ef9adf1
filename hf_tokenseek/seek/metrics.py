"""What TokenSeek did, as numbers: collected on the device, read when logged."""

from dataclasses import dataclass

from torch import Tensor

from ..means import Means
from .batch import IGNORE, Batch, Sizes
from .cost import Cost
from .scores import Scouted
from .select import DITCHED, Selection


@dataclass
class Trained:
    """
    One micro-batch after its forward pass.

    Args:
        loss (`torch.Tensor`): the summed (weighted) loss, connected to every parameter.
        selection ([`Selection`]): the rows that were trained.
        scouted ([`Scouted`], *optional*): what the scouting pass found.
        scores (`torch.FloatTensor` of shape `(batch, n)`, *optional*): what was made of it.
        kept_bytes (`int`): bytes of scouted keys and values that the backward pass reads.
        plainly (`bool`): whether it was trained without selection.
    """

    loss: Tensor
    selection: Selection
    scouted: Scouted | None = None
    scores: Tensor | None = None
    kept_bytes: int = 0
    plainly: bool = False


@dataclass(frozen=True)
class Summary:
    """The host numbers of one micro-batch; fields as in [`Trained`], `n` is its padded length."""

    sizes: Sizes
    n: int
    kept_bytes: int
    plainly: bool
    cost: Cost


class SeekMetrics:
    """
    Collects the selection statistics of micro-batches until [`read`] is called.

    Keys: `seek/selected_share` (selected rows / rows computed without TokenSeek), `seek/labelled_share` (labelled /
    real positions), `seek/kept_labels` (share of the labelled positions whose loss is trained), `seek/evidence_mass`
    (share of the collected attention mass on unlabelled positions that the kept ones hold), `seek/mean_position` (mean
    place of the kept unlabelled rows, from 0 for a sequence's first real token to 1 for its last; missing where none
    was kept), `seek/plain_share` (share of micro-batches trained plainly), `seek/gradient_cosine` and
    `seek/gradient_norm_ratio` (where probed).
    """

    def __init__(self):
        self.total, self.plain_total = 0, 0
        self.last: Summary | None = None
        self._means = Means()

    def observe(self, batch: Batch, done: Trained, cost: Cost, asked: bool = False) -> None:
        """Adds one micro-batch, of which everything was `asked` for or not; waits for no device."""
        sizes, n = batch.sizes, batch.shape[1]
        self.total, self.plain_total = self.total + 1, self.plain_total + (done.plainly and not asked)
        self.last = Summary(sizes, n, done.kept_bytes, done.plainly, cost)
        self._means.add("seek/selected_share", 1.0 if done.plainly else sizes.rows / n)
        self._means.add("seek/labelled_share", sum(sizes.labelled) / max(1, sum(sizes.real)))
        self._means.add("seek/plain_share", float(done.plainly))
        if done.plainly:
            return
        self._means.add("seek/kept_labels", (done.selection.targets != IGNORE).sum() / max(1, sum(sizes.labelled)))
        kept = done.selection.kinds(n) != DITCHED
        real = batch.segments >= 0
        unlabelled = ((batch.targets == IGNORE) & real).float()
        evidence = kept * unlabelled
        places = (real.cumsum(1) - 1) / (real.sum(1, keepdim=True) - 1).clamp(min=1)
        # 0 / 0 without evidence rows, which is not read
        self._means.add("seek/mean_position", (evidence * places).sum() / evidence.sum())
        if done.scouted is not None and done.scouted.mass is not None:
            mass = done.scouted.mass
            total = (mass * unlabelled).sum().clamp(min=1e-12)
            self._means.add("seek/evidence_mass", (mass * evidence).sum() / total)

    def probe(self, found: dict[str, float]) -> None:
        """Adds a comparison with the full gradient."""
        for name, value in found.items():
            self._means.add(f"seek/{name}", value)

    def read(self, reset: bool = True) -> dict[str, float]:
        """Means since the last call with `reset`; waits for the device."""
        return self._means.read(reset)

    def describe(self) -> list[str]:
        """Lines on the last micro-batch: shares, predicted cost and memory; and whether TokenSeek does not fit."""
        if self.last is None:
            return []
        sizes, n, cost = self.last.sizes, self.last.n, self.last.cost
        share = sizes.rows / n
        lines = [
            f"  labels      {sum(sizes.labelled) / max(1, sum(sizes.real)):.1%} of {sum(sizes.real)} real tokens",
            f"  rows        k/n = {sizes.rows}/{n} = {share:.1%}",
        ]
        if self.last.plainly:
            even = f"breaks even at k/n = {cost.break_even:.0%}"
            lines.append(f"  trained plainly: so many rows would be selected that scouting cannot pay ({even})")
        else:
            kept_mib = self.last.kept_bytes / 2**20
            lines += [
                f"  cost        {cost.seek(share):.2f} forwards predicted, plain {cost.plain:.2f}"
                f" (breaks even at k/n = {cost.break_even:.0%})",
                f"  memory      {share:.1%} of the activations + {kept_mib:.1f} MiB of scouted keys and values",
            ]
        misfit = self.misfit()
        return lines if misfit is None else [*lines, misfit]

    def misfit(self) -> str | None:
        """A plain word to the user if most micro-batches were trained plainly."""
        if self.plain_total <= self.total / 2:
            return None
        return (
            f"TokenSeek does not fit this data: {self.plain_total} of {self.total} micro-batches were trained "
            "plainly, because so many of their tokens would be selected that scouting cannot pay. Use gradient "
            "checkpointing, or a smaller `context`, `labelled` or `ratio` if you accept the approximation."
        )
