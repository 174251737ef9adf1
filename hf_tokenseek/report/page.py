"""`report.html` from the records of one run or several."""

from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from ..files import written_whole
from . import require_extra
from .record import RunRecord, read_run

PAGE = "report.html"


class Row(NamedTuple):
    """A line of a table: its name, a cell for each run, whether the cells differ."""

    name: str
    cells: list[str]
    differs: bool


def write_page(folders: Sequence[str | Path], output: str | Path) -> Path:
    """
    Writes one self-contained page about one run, or several side by side.

    Args:
        folders (`Sequence[str | Path]`): each with a record or a `trainer_state.json`, see [`read_run`].
        output (`str` or `Path`): the file.

    Raises:
        FileNotFoundError: a folder holds no run.
        ModuleNotFoundError: `jinja2` or `matplotlib` is missing.
        ValueError: a record is damaged.
    """
    require_extra()
    runs = [read_run(folder, name) for folder, name in zip(folders, names_of(folders), strict=True)]
    output = Path(output)
    with written_whole(output) as scratch:
        scratch.write_text(render(runs), encoding="utf-8")
    return output


def render(runs: list[RunRecord]) -> str:
    """The page as text; raises as [`write_page`] does."""
    require_extra()
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from .sections import sections
    from .tokens import Gap, token_maps

    environment = Environment(
        loader=PackageLoader("hf_tokenseek", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["gap"] = lambda part: isinstance(part, Gap)
    own = files("hf_tokenseek.report")
    return environment.get_template("page.html.jinja").render(
        title=", ".join(run.name for run in runs),
        runs=runs,
        summary=summary(runs),
        sections=sections(runs),
        maps=[(run, token_maps(run)) for run in runs],
        settings=settings(runs),
        style=own.joinpath("page.css").read_text(encoding="utf-8"),
        script=own.joinpath("tokens.js").read_text(encoding="utf-8"),
    )


def names_of(folders: Sequence[str | Path]) -> list[str]:
    """As short as they can be without two being alike."""
    paths = [Path(folder).resolve() for folder in folders]
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{path.name} ({number})" for number, path in enumerate(paths, start=1)]


def summary(runs: list[RunRecord]) -> list[Row]:
    """The figures of each run in a line; what no run has is left out."""
    # that figures of runs differ needs no mark
    rows = [
        _row(name, [compute(_values(run, key)) for run in runs])._replace(differs=False)
        for name, key, compute in _SUMMARY
    ]
    return [row for row in rows if any(cell != "–" for cell in row.cells)]


def settings(runs: list[RunRecord]) -> list[Row]:
    """Configuration, model, software and machine of each run, a line a value."""
    flat = [_flat({key: value for key, value in run.run.items() if key not in ("kind", "step")}) for run in runs]
    return [_row(name, [values.get(name) for values in flat]) for name in sorted({name for f in flat for name in f})]


def _first(values: list) -> Any:
    return values[0] if len(values) > 1 else None


def _last(values: list) -> Any:
    return values[-1] if values else None


def _largest(values: list) -> Any:
    return max(values, default=None)


def _median(values: list) -> Any:
    return sorted(values)[len(values) // 2] if values else None


_SUMMARY: tuple[tuple[str, str, Callable[[list], Any]], ...] = (
    ("optimizer steps", "step", _last),
    ("epochs", "epoch", _last),
    ("training loss, first logged", "loss", _first),
    ("training loss, last logged", "loss", _last),
    ("held-out loss, first", "eval_loss", _first),
    ("held-out loss, last", "eval_loss", _last),
    ("step time, median [s]", "speed/step_seconds", _median),
    ("tokens per second, median", "speed/tokens_per_second", _median),
    ("saved activations, largest [MiB]", "memory/saved_activations_mib", _largest),
    ("peak of allocated memory [MiB]", "memory/peak_mib", _largest),
    ("rows in the backward pass, median share", "seek/selected_share", _median),
    ("micro-batches trained plainly, last logged share", "seek/plain_share", _last),
    ("cosine with the full gradient, median", "seek/gradient_cosine", _median),
)


def _values(run: RunRecord, key: str) -> list:
    return [entry[key] for entry in run.logs if entry.get(key) is not None]


def _row(name: str, values: list) -> Row:
    cells = [_cell(value) for value in values]
    return Row(name, cells, len(set(cells)) > 1)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    # thousands apart; a year or a seed is not long enough to be changed
    return f"{value:,}".replace(",", "\u202f") if type(value) is int and abs(value) >= 10_000 else str(value)


def _flat(values: dict, above: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dots in the names."""
    found = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{above}{key}.")
        else:
            found[f"{above}{key}"] = value
    return found
