"""What the figures show, computed from a run's record."""

import statistics
from collections.abc import Sequence
from itertools import zip_longest
from typing import NamedTuple

from .record import RunRecord

# as the kinds of seek.select are written into a visit
DITCHED, EVIDENCE, LOSS = "0", "1", "2"
WIDEST = 60


class Points(NamedTuple):
    """A curve."""

    x: list[float]
    y: list[float]


def curve(run: RunRecord, key: str) -> Points:
    """Every value that was logged under `key`, over optimizer steps."""
    found = [(entry["step"], entry[key]) for entry in run.logs if entry.get(key) is not None]
    return Points([step for step, _ in found], [value for _, value in found])


def over_seconds(run: RunRecord, key: str) -> Points:
    """The same over the seconds that steps have taken; empty where they were not measured."""
    seconds, last, found = 0.0, 0, Points([], [])
    for entry in run.logs:
        if entry.get("speed/step_seconds") is None:
            continue
        seconds += (entry["step"] - last) * entry["speed/step_seconds"]
        last = entry["step"]
        if entry.get(key) is not None:
            found.x.append(seconds)
            found.y.append(entry[key])
    return found


def mean(values: Sequence[float]) -> float | None:
    """The mean, `None` of nothing."""
    return statistics.fmean(values) if values else None


def visits_of(run: RunRecord, sample: int) -> list[dict]:
    """What became of one watched sequence each time, in order."""
    return sorted((v for v in run.visits if v["sample"] == sample), key=lambda visit: visit["step"])


def chosen(visit: dict, kinds: str) -> set[int]:
    """Places of the tokens whose kind is among `kinds`."""
    return {place for place, kind in enumerate(visit["kinds"]) if kind in kinds}


def jaccard(first: set[int], second: set[int]) -> float:
    """Size of the intersection over size of the union; two empty sets are equal."""
    union = len(first | second)
    return len(first & second) / union if union else 1.0


def jaccard_by_chance(first: int, second: int, of: int) -> float:
    """The overlap of two random sets: their sizes over the size of what they are drawn from, in expectation."""
    common = first * second / of if of else 0.0
    union = first + second - common
    return common / union if union else 1.0


class Overlap(NamedTuple):
    """
    How much of the evidence a watched sequence keeps from one visit to the next.

    Args:
        visit (`int`): of the later one, from 2.
        found (`float`): [`jaccard`] of the two sets of evidence tokens.
        by_chance (`float`): of random sets of the same sizes among the tokens that were no loss rows.
    """

    visit: int
    found: float
    by_chance: float


def overlaps(run: RunRecord, sample: int) -> list[Overlap]:
    """From each selection of a watched sequence to its next; visits that were trained plainly chose nothing."""
    visits = [visit for visit in visits_of(run, sample) if visit["scores"] is not None]
    found = []
    for number, (before, after) in enumerate(zip(visits, visits[1:], strict=False), start=2):
        sets = chosen(before, EVIDENCE), chosen(after, EVIDENCE)
        free = len(after["kinds"]) - len(chosen(after, LOSS))
        found.append(Overlap(number, jaccard(*sets), jaccard_by_chance(*map(len, sets), free)))
    return found


def mean_overlaps(run: RunRecord) -> list[Overlap]:
    """Means over the watched sequences, by visit."""
    by_visit: dict[int, list[Overlap]] = {}
    for sample in run.samples:
        for overlap in overlaps(run, sample):
            by_visit.setdefault(overlap.visit, []).append(overlap)
    return [
        Overlap(visit, mean([o.found for o in all_of]), mean([o.by_chance for o in all_of]))
        for visit, all_of in sorted(by_visit.items())
    ]


def position_totals(run: RunRecord) -> dict[str, list[int]]:
    """Ditched, evidence and loss tokens of the whole run by place; empty where nothing was selected."""
    kinds = ("ditched", "evidence", "loss") if run.positions else ()
    return {kind: [sum(column) for column in zip(*(p[kind] for p in run.positions), strict=True)] for kind in kinds}


def added(first: list[list[int]], second: list[list[int]]) -> list[list[int]]:
    """The sum of two tables, place by place; what one of them lacks counts as 0."""
    return [[a + b for a, b in zip_longest(*rows, fillvalue=0)] for rows in zip_longest(first, second, fillvalue=())]


class HeatMap(NamedTuple):
    """
    Shares between 0 and 1.

    Args:
        values (`list[list[float]]`): a row a layer, from the input up.
        edges (`list[float]`): where columns begin, and where the last one ends.
    """

    values: list[list[float]]
    edges: list[float]


def trained_layers(run: RunRecord) -> HeatMap | None:
    """Share of the draws in which a layer was drawn; a column a draw, or several where there are many."""
    if not run.draws:
        return None
    size = -(-len(run.draws) // WIDEST)
    columns = [run.draws[start : start + size] for start in range(0, len(run.draws), size)]
    end = max([run.draws[-1]["step"], *(entry["step"] for entry in run.logs)]) + 1
    values = [
        [sum(layer in draw["layers"] for draw in column) / len(column) for column in columns]
        for layer in range(run.draws[0]["of"])
    ]
    return HeatMap(values, [*(column[0]["step"] for column in columns), end])


def kept_blocks(run: RunRecord) -> HeatMap | None:
    """The latest count of each layer's kept blocks, as a share of the most that any block has been kept."""
    if not run.grids:
        return None
    counts = run.grids[-1]["values"]
    width = max(map(len, counts), default=0)
    most = max((value for row in counts for value in row), default=0) or 1
    rows = [[value / most for value in row] + [0.0] * (width - len(row)) for row in counts]
    return HeatMap(rows, list(range(width + 1)))
