"""Records to learn from: the built-in task, JSONL files, or data sets of the hub.

A record is either `{"prompt": str, "completion": str}` or `{"messages": [{"role": str, "content": str}, ...]}`.
"""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes.python_docstrings import python_docstrings

PYTHON_DOCSTRINGS = "python-docstrings"
FORMATS = '{"prompt": str, "completion": str} or {"messages": [{"role": str, "content": str}, ...]}'

Record = Mapping[str, Any]


def load_records(source: str, split: str = "train") -> list[dict[str, Any]]:
    """Read a data set.

    Args:
        source (`str`):
            `"python-docstrings"` for the built-in task, the path of a JSONL file, or what `datasets.load_dataset`
            takes.
        split (`str`, *optional*, defaults to `"train"`):
            Split of the built-in task or of the hub's data set; a JSONL file has none.

    Returns:
        `list[dict[str, Any]]`: the records.

    Raises:
        `FileNotFoundError`: if `source` ends in `.jsonl` and there is no such file.
        `ValueError`: if a line of the file is not a JSON object, or the file is empty.
        `ModuleNotFoundError`: if a hub data set is asked for and `datasets` is not installed.
    """
    if source == PYTHON_DOCSTRINGS:
        return python_docstrings(split)
    if source.endswith(".jsonl"):
        return read_jsonl(source)
    try:
        from datasets import load_dataset
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"The data set {source!r} is neither `{PYTHON_DOCSTRINGS}` nor a `.jsonl` file, so it is read with the "
            "package `datasets`, which is not installed. Run `pip install datasets`, or give a JSONL file."
        ) from None
    return load_dataset(source, split=split).to_list()


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Read one JSON object a line; empty lines are skipped. Raises as [`load_records`] does."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no data file {str(path)!r}. Expected a JSONL file with records {FORMATS}.")
    records = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"Line {number} of {str(path)!r} is not JSON ({error}). Expected {FORMATS}.") from None
        if not isinstance(record, dict):
            raise ValueError(f"Line {number} of {str(path)!r} is no JSON object. Expected {FORMATS}.")
        records.append(record)
    if not records:
        raise ValueError(f"The data file {str(path)!r} holds no records. Expected one of {FORMATS} a line.")
    return records


def hold_out(records: Sequence[Record], count: int, seed: int = 0) -> tuple[list[Record], list[Record]]:
    """Part `records` at random into those to train on and `count` to evaluate on.

    Raises:
        `ValueError`: if no record would be left to train on.
    """
    if not 0 < count < len(records):
        raise ValueError(f"Cannot hold out {count} of {len(records)} records: at least 1 must be left for each part.")
    shuffled = random.Random(seed).sample(list(records), len(records))
    return shuffled[count:], shuffled[:count]
