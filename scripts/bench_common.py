"""What the benchmarks share: device, environment, results that survive an interruption, tables with spread, bars.

Importing it puts the repository's root on the path, so that a script finds `recipes`.
"""

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# figures of a GPU and of a CPU do not mix
EVIDENCE = ROOT / "docs" / "evidence" / ("gpu" if DEVICE == "cuda" else "")
MIB, GIB = 2**20, 2**30
# What a figure depends on; results and documents may change while a benchmark runs.
CODE = ("hf_tokenseek", "kernels", "recipes", "scripts")

sys.path.insert(0, str(ROOT))


class Spread(NamedTuple):
    """Median and range of repeated measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        values = list(values)
        return cls(statistics.median(values), min(values), max(values))

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} ({self.low:{spec}}..{self.high:{spec}})"


def quotient(mine: Sequence[float], other: Sequence[float]) -> Spread:
    """Quotient of the medians of measurements taken in turns, and the range of the quotients within a round."""
    within = [a / b for a, b in zip(mine, other, strict=True)]
    return Spread(Spread.of(mine).median / Spread.of(other).median, min(within), max(within))


class Bar(NamedTuple):
    """A promise of the project: `value` must not be above `limit`."""

    promise: str
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.value <= self.limit

    def __str__(self) -> str:
        return f"{'PASS' if self.passed else 'FAIL'}  {self.promise} <= {self.limit:g}: {self.value:.4f}"


class Results:
    """
    Figures by cell, on disk after every cell. Figures of other settings are dropped; the environment of each cell is
    written down, and where `key` holds it, figures of another one are dropped, too.

    Args:
        path (`Path`): JSON file to write.
        key (`dict`): settings, and the environment where figures of two must not stand in one table.
        fresh (`bool`, *optional*, defaults to `False`): start over in any case.

    Attributes:
        cells (`dict[str, Any]`): what is known so far.
    """

    def __init__(self, path: Path, key: dict[str, Any], fresh: bool = False):
        self.path, self.key, self.cells = path, key, {}
        self._environments, self._made_in = [], {}
        # read now: code may change while a benchmark runs
        self._here = environment()
        if path.exists() and not fresh:
            stored = json.loads(path.read_text())
            if stored["key"] == key:
                self.cells, self._environments, self._made_in = (
                    stored[part] for part in ("cells", "environments", "made_in")
                )
            else:
                print(f"{path} holds figures of another environment or other settings: starting over")

    def __contains__(self, name: str) -> bool:
        return name in self.cells

    def __setitem__(self, name: str, figures: Any) -> None:
        from hf_tokenseek.files import written_whole

        self.cells[name] = figures
        if self._here not in self._environments:
            self._environments.append(self._here)
        self._made_in[name] = self._environments.index(self._here)
        whole = {"key": self.key, "environments": self._environments, "made_in": self._made_in, "cells": self.cells}
        with written_whole(self.path) as scratch:
            scratch.write_text(json.dumps(whole, indent=1) + "\n")

    def made_here(self, name: str) -> bool:
        """Whether a cell is of this machine and its packages; the code may have been another."""

        def but_commit(found: dict[str, Any]) -> dict[str, Any]:
            return {part: value for part, value in found.items() if part != "commit"}

        return but_commit(self._environments[self._made_in[name]]) == but_commit(self._here)

    def origins(self) -> str:
        """A paragraph for each environment that figures come from."""
        used = sorted({self._made_in[name] for name in self.cells})
        return "\n\n".join(in_one_line(self._environments[index]) for index in used)

    def publish(self, report: str) -> None:
        """Prints the report and writes it beside the figures."""
        print(report)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.with_suffix(".md").write_text(report + "\n")
        print(f"\nwritten: {self.path} and .md")


def cell(results: Results, name: str, make: Callable[[], Any]) -> Any:
    """The figures of cell `name`, made and written if they are not there yet."""
    if name not in results:
        results[name] = make()
    return results.cells[name]


def now() -> float:
    """Seconds of a clock that is read when the GPU has done what it was told."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def load_smollm2():
    """The model, where figures are taken, and its tokenizer."""
    from recipes.models import load_smollm2

    model, tokenizer = load_smollm2()
    return model.to(DEVICE), tokenizer


def collator(pad_token_id: int) -> Callable[[list[dict]], dict[str, torch.Tensor]]:
    """The recipe's collator; its batches lie where figures are taken."""
    from recipes.data import PadCollator

    collate = PadCollator(pad_token_id)
    return lambda records: {name: tensor.to(DEVICE) for name, tensor in collate(records).items()}


def environment() -> dict[str, str | int]:
    """What the figures depend on; `commit` says so where the code is not what was committed."""
    import transformers

    import hf_tokenseek

    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf_tokenseek": hf_tokenseek.__version__,
        "commit": _commit(),
        **(_gpu() if DEVICE == "cuda" else {}),
    }


def in_one_line(key: dict[str, Any]) -> str:
    """`name value` of everything in it."""
    return ", ".join(f"{name} {value}" for name, value in key.items())


def mean_and_deviation(values: Sequence[float]) -> str:
    """Mean ± standard deviation; the mean alone of one value."""
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{deviation}"


def mean_and_range(values: Sequence[float]) -> str:
    """Mean, and the lowest and highest value."""
    return f"{statistics.mean(values):.3f} ({min(values):.3f}..{max(values):.3f})"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table, names on the left, figures aligned on the right."""
    rules = ["---", *("---:" for _ in header[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rules, *rows))


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """The options that every benchmark has."""
    parser.add_argument("--output", type=Path, help="JSON file; the table goes beside it as .md")
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    parser.add_argument("--bars", action="store_true", help="check the project's bars: PASS or FAIL with the figure")
    parser.add_argument("--strict", action="store_true", help="with --bars: exit status 1 if one fails")


def judge(bars: Sequence[Bar]) -> str:
    """One line a bar."""
    return "\n".join(map(str, bars)) or "no bar applies to what was measured"


def exit_status(bars: Sequence[Bar], strict: bool) -> int:
    """1 if a bar failed and `strict` asks for it."""
    return int(strict and not all(bar.passed for bar in bars))


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _gpu() -> dict[str, str]:
    found = {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda or torch.version.hip)}
    for package in ("triton", "liger-kernel"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _commit() -> str:
    def git(*command: str) -> str:
        return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changes = git("diff", "HEAD", "--", *CODE)
        mark = f"-changed-{hashlib.sha256(changes.encode()).hexdigest()[:8]}" if changes else ""
        return git("rev-parse", "--short", "HEAD") + mark
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
