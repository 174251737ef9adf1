"""What is alive at a moment, and where in the program that is."""

from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import CodeType
from typing import Any, NamedTuple

GIB = 2**30
KINDS = ("parameters", "gradients", "optimizer", "activations", "temporaries")


class Label(NamedTuple):
    """
    What a storage is.

    Args:
        kind (`str`): one of `KINDS`.
        layer (`int`, *optional*): the decoder layer it belongs to or was made in; `None` outside of the layers.
    """

    kind: str
    layer: int | None = None


@dataclass(frozen=True)
class Peak:
    """
    What was alive at the largest moment of a phase.

    Args:
        phase (`str`): the phase.
        labels (`dict[Label, int]`): bytes, by kind and layer.
        op (`Any`): the operator that had just run.
        frames (`tuple`): code objects and lines that it was called from, the innermost first.
    """

    phase: str
    labels: dict[Label, int]
    op: Any = None
    frames: tuple[tuple[CodeType, int], ...] = field(default=(), repr=False)

    def beside(self, others: dict[Label, int]) -> "Peak":
        """The same moment, with other bytes alive as well."""
        return replace(self, labels=dict(Counter(self.labels) + Counter(others)))

    @cached_property
    def bytes(self) -> int:
        """All of it."""
        return sum(self.labels.values())

    @cached_property
    def kinds(self) -> dict[str, int]:
        """Bytes of each of `KINDS`."""
        found = Counter(dict.fromkeys(KINDS, 0))
        for label, size in self.labels.items():
            found[label.kind] += size
        return dict(found)

    @cached_property
    def layers(self) -> dict[int | None, int]:
        """Bytes of each decoder layer, ascending; `None`, the last, is what lies outside of them."""
        found: Counter[int | None] = Counter()
        for label, size in self.labels.items():
            found[label.layer] += size
        return dict(sorted(found.items(), key=lambda item: (item[0] is None, item[0] or 0)))

    def layers_of(self, kind: str) -> dict[int, int]:
        """Bytes of one of `KINDS` in each decoder layer that has any, ascending."""
        found = {layer: size for (own, layer), size in self.labels.items() if own == kind and layer is not None}
        return dict(sorted(found.items()))

    def stack(self) -> list[str]:
        """Where it was, the outermost call first; inside of autograd's engine that is the call of `backward`."""
        lines = [f"{code.co_filename}:{line} in {code.co_name}" for code, line in reversed(self.frames)]
        return [*lines, str(self.op)]


def table(peaks: dict[str, Peak]) -> str:
    """Phases and kinds in GiB, for a terminal."""
    rows = [("GiB", *KINDS, "total")]
    for name, peak in peaks.items():
        rows.append((name, *(f"{peak.kinds[kind] / GIB:.3f}" for kind in KINDS), f"{peak.bytes / GIB:.3f}"))
    return "\n".join(
        "".join(f"{cell:>13}" if column else f"{cell:9}" for column, cell in enumerate(row)) for row in rows
    )
