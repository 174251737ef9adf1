"""The run's record, `report.jsonl`: one JSON object a line, from which the report can be made at any time."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import written_whole

RECORD, STATE = "report.jsonl", "trainer_state.json"

Event = dict[str, Any]


class RecordFile:
    """
    Writes the record of a run.

    The file is replaced as a whole when a run begins and only appended to after that. What a killed process leaves is
    whole but for its last line, which readers pass over.

    Args:
        folder (`str` or `Path`): the run's `output_dir`.
    """

    def __init__(self, folder: str | Path):
        self.file = Path(folder) / RECORD

    def begin(self, events: Iterable[Event]) -> None:
        """A file with these events and nothing else."""
        with written_whole(self.file) as scratch:
            scratch.write_text(_lines(events), encoding="utf-8")

    def append(self, events: Iterable[Event]) -> None:
        """These events behind the others, in one write."""
        if text := _lines(events):
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(text)

    def read_until(self, step: int) -> list[Event]:
        """What was recorded of the first `step` optimizer steps, without the logs, which every checkpoint has."""
        if not self.file.is_file():
            return []
        return [e for e in read_events(self.file) if e["kind"] not in ("run", "log") and e["step"] <= step]


@dataclass
class RunRecord:
    """
    What is known of one run.

    Args:
        name (`str`): for readers.
        run (`dict`): configuration, model, versions; empty for a run without a record of its own.
        logs (`list[dict]`): the Trainer's log.
        samples (`dict[int, dict]`): `ids` and `texts` of the watched sequences' tokens.
        visits (`list[dict]`): what became of a watched sequence, `sample` and `step`; see [`~seek.watch.Visit`].
        positions (`list[dict]`): `ditched`, `evidence` and `loss` tokens by place, since the last such event.
        draws (`list[dict]`): `layers` that sparse tuning trains from a step on.
        grids (`list[dict]`): `values` of layers x blocks, added up since the run began, with a `name`.
        layers (`list[dict]`): `values` of each layer, with a `name` that has the unit.
    """

    name: str
    run: dict = field(default_factory=dict)
    logs: list[dict] = field(default_factory=list)
    samples: dict[int, dict] = field(default_factory=dict)
    visits: list[dict] = field(default_factory=list)
    positions: list[dict] = field(default_factory=list)
    draws: list[dict] = field(default_factory=list)
    grids: list[dict] = field(default_factory=list)
    layers: list[dict] = field(default_factory=list)

    def add(self, event: Event) -> None:
        """Takes in one line of the record; a kind that a later version may have invented is passed over."""
        kind = event["kind"]
        if kind == "run":
            self.run = event
        elif kind == "log":
            self.logs.append(event["entry"])
        elif kind == "sample":
            self.samples[event["sample"]] = event
        elif kind in _LISTS:
            getattr(self, _LISTS[kind]).append(event)


_LISTS = {"visit": "visits", "positions": "positions", "draw": "draws", "grid": "grids", "layers": "layers"}


def read_run(folder: str | Path, name: str | None = None) -> RunRecord:
    """
    Reads the record of a run, or the Trainer's own log where there is none.

    Args:
        folder (`str` or `Path`): the run's `output_dir`, or one of its checkpoints.
        name (`str`, *optional*): what to call it; the folder's name if not given.

    Raises:
        FileNotFoundError: the folder has neither file.
        ValueError: what is there is not what it should be.
    """
    folder = Path(folder)
    found = RunRecord(name or folder.resolve().name)
    if (folder / RECORD).is_file():
        for event in read_events(folder / RECORD):
            found.add(event)
    elif (folder / STATE).is_file():
        found.logs = read_logs(folder / STATE)
    else:
        raise FileNotFoundError(
            f"{str(folder)!r} has neither {RECORD} (which ReportCallback writes) nor {STATE} (Trainer.save_state and "
            "every checkpoint). Name the output_dir of a run."
        )
    return found


def read_logs(file: Path) -> list[dict]:
    """
    The Trainer's own log.

    Raises:
        ValueError: the file is no JSON, or has no log in it.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))["log_history"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{str(file)!r} is no state of a Trainer with a `log_history`: {error!r}. Name the output_dir of a run."
        ) from error


def read_events(file: Path) -> list[Event]:
    """
    The events of a record, oldest first.

    Raises:
        ValueError: a line other than the last is no JSON object.
    """
    lines = file.read_text(encoding="utf-8").rstrip("\n").split("\n")
    events = []
    for number, line in enumerate(lines, start=1):
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break  # the process was killed while it wrote
            raise ValueError(
                f"Line {number} of {str(file)!r} is no JSON ({error}). Remove it and try again."
            ) from error
    return events


def _lines(events: Iterable[Event]) -> str:
    return "".join(f"{json.dumps(_storable(event))}\n" for event in events)


def _storable(value: Any) -> Any:
    """Floats in five digits, which is more than a picture shows; what is no number in JSON becomes `null`."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if abs(value) < float("inf") else None
    if isinstance(value, dict):
        return {str(key): _storable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_storable(item) for item in value]
    return value if isinstance(value, (str, int, bool)) or value is None else str(value)
