"""The sections of a report: figures of what was recorded, and a sentence where nothing was."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from . import figures
from .figures import STEPS, Drawn, Line
from .record import RunRecord
from .statistics import Points, curve, kept_blocks, mean_overlaps, over_seconds, position_totals, trained_layers

Runs = list[RunRecord]


class Section(NamedTuple):
    """
    A part of the page.

    Args:
        id (`str`): for links.
        title (`str`): its heading.
        about (`str`): one sentence on how to read it.
        figures (`list[Drawn]`): its pictures.
        missing (`list[str]`): a sentence for each picture that could not be drawn.
    """

    id: str
    title: str
    about: str
    figures: list[Drawn]
    missing: list[str]


class Curve(NamedTuple):
    """A figure of logged values: its title, its unit, the keys of the log by legend, and why there may be none."""

    title: str
    unit: str
    keys: dict[str, str]
    missing: str
    zero: bool = False
    points: Callable[[RunRecord, str], Points] = curve
    x: str = STEPS


_SPEED = "step times: MemoryCallback, which measures them, was not in the run"
_SEEK = "TokenSeek was off, or no step was logged"
PROGRESS = (
    Curve("Training loss", "loss", {"": "loss"}, "no training loss was logged"),
    Curve(
        "Training loss over time",
        "loss",
        {"": "loss"},
        _SPEED,
        points=over_seconds,
        x="seconds of training steps",
    ),
    Curve("Held-out loss", "loss", {"": "eval_loss"}, "nothing was evaluated"),
    Curve("Gradient norm", "norm", {"": "grad_norm"}, "the Trainer logged none"),
    Curve("Step time", "seconds", {"": "speed/step_seconds"}, _SPEED, zero=True),
)
MEMORY = (
    Curve(
        "Saved activations, largest micro-batch",
        "MiB",
        {"": "memory/saved_activations_mib"},
        "MemoryCallback was not in the run, or could not count them",
        zero=True,
    ),
    Curve(
        "Peak of allocated memory",
        "MiB",
        {"": "memory/peak_mib"},
        "MemoryCallback was not in the run, or the device counts no allocations (a CPU does not)",
        zero=True,
    ),
    Curve(
        "Reserved by the allocator",
        "MiB",
        {"now": "memory/reserved_mib", "at most": "memory/peak_reserved_mib"},
        'MemoryCallback(level="layer") on a GPU asks for it',
        zero=True,
    ),
)
# title, names, and the key of the log that a name stands in
MEMORY_PARTS = (
    (
        "The largest moment, by kind",
        ("parameters", "gradients", "optimizer", "activations", "temporaries"),
        "memory/{}_mib",
    ),
    ("The largest moment of each phase", ("forward", "scout", "select", "backward", "step"), "memory/{}_peak_mib"),
)
SELECTION = (
    Curve(
        "Rows in the backward pass",
        "share",
        {"selected": "seek/selected_share", "labelled": "seek/labelled_share"},
        _SEEK,
        zero=True,
    ),
    Curve(
        "Attention mass of the evidence",
        "share",
        {"": "seek/evidence_mass"},
        "TokenSeek was off, or its score collects no attention",
        zero=True,
    ),
    Curve(
        "Cosine with the full gradient",
        "cosine",
        {"": "seek/gradient_cosine"},
        "it is measured with SeekConfig(probe_steps=...) only",
    ),
)


def sections(runs: Runs) -> list[Section]:
    """Everything with figures, in the order of the page."""
    return [
        _section("loss", "Loss and speed", "", _curves("loss", PROGRESS, runs)),
        _section("memory", "Memory", "", [*_curves("memory", MEMORY, runs), *_parts(runs)]),
        _section(
            "layers",
            "Memory by layer",
            "Layer 0 is the first one above the embeddings.",
            [_by_layer(runs)],
        ),
        _section(
            "selection",
            "Selection",
            "Overlap is |A∩B| / |A∪B| of the evidence tokens of a sample in two successive visits, as a mean over the "
            "samples of the token map; loss rows, which the labels decide, are left out.",
            [*_curves("selection", SELECTION, runs), _overlap(runs), *_positions(runs)],
        ),
        _section(
            "ist",
            "Layers that trained",
            "Sparse tuning trains a few layers at a time; a column is one or several draws.",
            _heat_maps("ist", runs, trained_layers, "share of the draws", STEPS, "sparse tuning was off"),
        ),
        _section(
            "lemo",
            "Kept blocks",
            "How often LeMo's layers kept each block of a sequence, in the steps that were logged, as a share of the "
            "most kept one.",
            _heat_maps("lemo", runs, kept_blocks, "share of the most kept", "block", "LeMo was off"),
        ),
    ]


def _section(name: str, title: str, about: str, parts: Iterable[Drawn | str]) -> Section:
    parts = list(parts)
    drawn = [part for part in parts if isinstance(part, Drawn)]
    return Section(name, title, about if drawn else "", drawn, [part for part in parts if isinstance(part, str)])


def _label(run: RunRecord, key: str, runs: Runs, keys: Any) -> str:
    """What tells a curve from the others in its figure."""
    parts = [run.name] * (len(runs) > 1) + [key] * (len(keys) > 1)
    return ", ".join(parts) or run.name


def _curves(section: str, specs: Iterable[Curve], runs: Runs) -> list[Drawn | str]:
    found = []
    for number, spec in enumerate(specs):
        curves = [
            Line(_label(run, short, runs, spec.keys), spec.points(run, key), *_look(place, column, runs))
            for place, run in enumerate(runs)
            for column, (short, key) in enumerate(spec.keys.items())
        ]
        if any(len(line.points.x) > 1 for line in curves):
            look = {"x": spec.x, "zero": spec.zero}
            found.append(figures.lines(f"{section}-{number}", spec.title, spec.unit, curves, **look))
        else:
            found.append(f"{spec.title}: {_told([line for line in curves if line.points.x], spec)}.")
    return found


def _look(run: int, key: int, runs: Runs) -> tuple[int, int]:
    """Colour and dashes: of several runs, each has its colour; of one, each key."""
    return (run, run + 2 * key) if len(runs) > 1 else (key, key)


def _told(curves: list[Line], spec: Curve) -> str:
    """In place of a figure without a curve."""
    single = (f"{label} {points.y[0]:.4g} at {spec.x} {points.x[0]:.4g}" for label, points, *_ in curves)
    return f"a single value, {'; '.join(single)}" if curves else f"not recorded ({spec.missing})"


def _parts(runs: Runs) -> list[Drawn | str]:
    """What MemoryCallback has tracked: the latest of each figure, run beside run."""
    found = []
    for number, (title, names, key) in enumerate(MEMORY_PARTS):
        latest = {run.name: [curve(run, key.format(name)).y[-1:] for name in names] for run in runs}
        bars = {run: [sum(value) for value in values] for run, values in latest.items() if any(values)}
        if bars:
            found.append(figures.bars(f"memory-parts-{number}", title, "MiB", bars, names=names))
        else:
            found.append(f'{title}: not recorded (MemoryCallback(level="layer") tracks it).')
    return found


def _by_layer(runs: Runs) -> Drawn | str:
    groups = {}
    for run in runs:
        latest = {event["name"]: event["values"] for event in run.layers}
        groups |= {_of_run(name, run, runs): values for name, values in latest.items()}
    if not groups:
        return 'Memory of each layer: not recorded (MemoryCallback(level="layer") tracks it).'
    return figures.bars("layers-bars", "Memory of each layer", "MiB", groups, "layer")


def _overlap(runs: Runs) -> Drawn | str:
    found = {_label(run, "", runs, ()): points for run in runs if (points := mean_overlaps(run))}
    if any(len(points) > 1 for points in found.values()):
        return figures.overlap("selection-overlap", "Overlap of the evidence between visits", found)
    if found:
        told = (f"{name} {only.found:.2f} (by chance {only.by_chance:.2f})" for name, (only,) in found.items())
        return f"Overlap of the evidence between the first two visits: {'; '.join(told)}."
    if any(run.visits for run in runs):
        return (
            "Overlap between visits: none yet, no followed sample was selected from twice (it takes a second epoch)."
        )
    return "Overlap between visits: not recorded (no sample was followed)."


def _positions(runs: Runs) -> list[Drawn | str]:
    found = [
        figures.positions(f"selection-positions-{number}", _of_run("Where selected tokens stand", run, runs), totals)
        for number, run in enumerate(runs)
        if (totals := position_totals(run))
    ]
    return found or ["Where selected tokens stand: not recorded (no micro-batch was selected from)."]


def _heat_maps(name: str, runs: Runs, compute: Callable, unit: str, x: str, why: str) -> list[Drawn | str]:
    found = [
        figures.heat_map(f"{name}-{number}", run.name, unit, values, x)
        for number, run in enumerate(runs)
        if (values := compute(run)) is not None
    ]
    return found or [f"Not recorded: {why}."]


def _of_run(title: str, run: RunRecord, runs: Runs) -> str:
    return f"{title}: {run.name}" if len(runs) > 1 else title
