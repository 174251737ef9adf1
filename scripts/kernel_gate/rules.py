"""The rules: no spills, shared memory within the target's limit, tensor cores where they belong, committed budgets."""

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from tokenseek_kernels.compilation import TARGETS

from .build import Row

Known = dict[str, dict[str, dict[str, int | str]]]
FIGURES = ("registers", "shared", "matrix", "code")


class Budgets:
    """
    What every row may use, in registers and shared memory, and what it was when the budgets were written:
    `{kernel: {"sm_90 aligned": {"registers": 128, "shared": 65536, "matrix": 32, "code": "0123456789ab"}}}`.

    Rows that break a fixed rule never get in. The budgets hold for the Triton they were written with; another one
    allocates registers differently, so that only the fixed rules are left.

    Args:
        triton (`str`): version they were written with.
        rows (`dict`): the budgets.
    """

    def __init__(self, triton: str, rows: Known):
        self.triton, self.rows = triton, rows

    @classmethod
    def load(cls, path: Path) -> "Budgets":
        """Those of a file; none if there is no file."""
        stored = json.loads(path.read_text()) if path.exists() else {"triton": "", "rows": {}}
        return cls(stored["triton"], stored["rows"])

    def save(self, path: Path) -> None:
        """Writes one line a row, so that a change is one line in a diff."""
        kernels = [
            f"  {json.dumps(kernel)}: {{\n"
            + ",\n".join(f"   {json.dumps(variant)}: {json.dumps(limits)}" for variant, limits in sorted(rows.items()))
            + "\n  }"
            for kernel, rows in sorted(self.rows.items())
        ]
        lines = ",\n".join(kernels)
        path.write_text(f'{{\n "triton": {json.dumps(self.triton)},\n "rows": {{\n{lines}\n }}\n}}\n')

    def recall(self, row: Row, triton: str) -> Row | None:
        """The row with its figures, if the same code was compiled by the same Triton when the budgets were written."""
        known = self.rows.get(row.kernel, {}).get(row.variant)
        return replace(row, **known) if known and (self.triton, known["code"]) == (triton, row.code) else None

    def update(self, rows: Iterable[Row], triton: str, asked: Callable[[str, str], bool]) -> None:
        """Takes the figures of the rows over, and drops what was asked for and is no more, or is of another Triton."""
        same = self.triton == triton
        kept = {
            kernel: {variant: limits for variant, limits in variants.items() if same and not asked(kernel, variant)}
            for kernel, variants in self.rows.items()
        }
        for row in rows:
            if not fixed_breaches(row):
                kept.setdefault(row.kernel, {})[row.variant] = {name: getattr(row, name) for name in FIGURES}
        self.rows, self.triton = {kernel: variants for kernel, variants in kept.items() if variants}, triton

    def breaches(self, rows: list[Row], triton: str, asked: Callable[[str, str], bool]) -> list[str]:
        """
        One line for each row that is above its budget, has none, or is gone; see [`fixed_breaches`] for the others.

        Args:
            rows (`list[Row]`): what was compiled.
            triton (`str`): version that compiled it.
            asked (`Callable`): whether `(kernel, variant)` belongs to what was to be compiled.
        """
        found = [line for row in rows for line in self._breaches_of(row, triton)]
        there = {(row.kernel, row.variant) for row in rows}
        for kernel, variants in self.rows.items():
            for variant in variants:
                if asked(kernel, variant) and (kernel, variant) not in there:
                    found.append(f"{kernel}, {variant}: has a budget but is not compiled any more")
        return found

    def _breaches_of(self, row: Row, triton: str) -> list[str]:
        limits = self.rows.get(row.kernel, {}).get(row.variant)
        # what breaks a fixed rule has no budget, and is said already
        if fixed_breaches(row):
            return []
        if limits is None:
            return [f"{row.kernel}, {row.variant}: has no budget"]
        if triton != self.triton:
            return []
        return [
            f"{row.kernel}, {row.variant}: {getattr(row, name)} {what}, {limit} in the budget"
            for name, what, limit in (
                ("registers", "registers", limits["registers"]),
                ("shared", "bytes of shared memory", limits["shared"]),
            )
            if getattr(row, name) > limit
        ]


def fixed_breaches(row: Row) -> list[str]:
    """One line for each fixed rule that a row breaks."""
    if row.error:
        return [f"{row.kernel}, {row.variant}: does not compile: {row.error}"]
    limit = TARGETS[row.target].shared_memory
    broken = {
        f"spills registers ({row.stack} bytes of stack, {row.spills} loads and stores)": row.stack or row.spills,
        f"{row.shared} bytes of shared memory, the target has {limit}": row.shared > limit,
        "a matrix product without a tensor-core instruction": row.matmul and not row.matrix,
    }
    return [f"{row.kernel}, {row.variant}: {what}" for what, is_so in broken.items() if is_so]
