"""What sparse tuning costs and did, in figures for the log and as a picture of letters."""

import math
import time
from collections.abc import Sequence

# shares of a column's periods in which a layer trained
SHADES = " .:+#"
WIDEST = 60


class Telemetry:
    """Collects figures between two logs."""

    def __init__(self):
        self._reset()

    def probed(self, seconds: float) -> None:
        """Layers were suppressed for so long."""
        self._seconds += seconds

    def read(self, reset: bool = True) -> dict[str, float]:
        """
        The figures since the last call with `reset`.

        Returns:
            `dict[str, float]`: `ist/probe_share`, the share of the time that learning the importance took.
        """
        found = {"ist/probe_share": self._seconds / max(time.perf_counter() - self._began, 1e-9)}
        if reset:
            self._reset()
        return found

    def _reset(self) -> None:
        self._began, self._seconds = time.perf_counter(), 0.0


def heat_map(history: Sequence[tuple[int, Sequence[int]]], layers: Sequence[int]) -> str:
    """
    Who trained when: a line a layer, the last one on top, a column a draw, or several where there are many.

    Args:
        history (`Sequence[tuple[int, Sequence[int]]]`): step and layers of each draw.
        layers (`Sequence[int]`): all that may be drawn.
    """
    per_column = -(-len(history) // WIDEST)
    columns = [history[start : start + per_column] for start in range(0, len(history), per_column)]
    lines = [f"  layer | trained, steps {history[0][0]} to {history[-1][0]}, {per_column} draw(s) a column"]
    for layer in reversed(layers):
        shares = (sum(layer in drawn for _, drawn in column) / len(column) for column in columns)
        lines.append(f"  {layer:5} | " + "".join(SHADES[math.ceil(share * (len(SHADES) - 1))] for share in shares))
    return "\n".join(lines)
