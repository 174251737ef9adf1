"""
Compiles every Triton kernel in every configuration for every target, without a GPU, and fails where one spills
registers, takes more shared memory than the target has, misses the tensor cores, or is above its committed budget.

    python scripts/check_kernels.py                                         # everything
    python scripts/check_kernels.py --changed                               # what is not as it was
    python scripts/check_kernels.py --kernels attention --targets sm_90     # a part
    python scripts/check_kernels.py --update                                # writes the budgets

The budgets remember what was compiled. As compilers repeat themselves, `--changed` leaves out what has the source,
configuration and Triton that it had when they were written, and takes seconds where no kernel was touched.

What it cannot see: speed, races, and the numbers that come out. The interpreter's tests check the numbers.
"""

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path

# an interpreted kernel cannot be compiled, and Triton reads this when it is imported
os.environ.pop("TRITON_INTERPRET", None)
# the default of the supported versions, said aloud because 3.9 warns where it is not
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton  # noqa: E402
from bench_common import markdown_table  # noqa: E402
from kernel_gate.build import Row  # noqa: E402
from kernel_gate.jobs import Job, find_jobs, kernel_modules  # noqa: E402
from kernel_gate.rules import Budgets, fixed_breaches  # noqa: E402
from tqdm import tqdm  # noqa: E402

from tokenseek_kernels.compilation import TARGETS  # noqa: E402

BUDGETS = Path(__file__).with_name("kernel_budgets.json")
HEADER = ("kernel", "target", "aligned", "registers", "stack [B]", "spills", "shared [B]", "limit [B]", "tensor core")


def compile_all(jobs: Sequence[Job], processes: int) -> list[Row]:
    """Compiles in several processes, with empty caches; rows in the order of the jobs."""
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        # forked, so that the processes need not import torch and triton again
        with get_context("fork").Pool(processes) as pool:
            return list(tqdm(pool.imap(Job.run, jobs), total=len(jobs), desc="compiling", disable=None))


def table(rows: Sequence[Row]) -> str:
    """One line a row."""
    return markdown_table(
        HEADER,
        (
            (
                row.kernel,
                row.target,
                "yes" if row.aligned else "no",
                *(str(figure) for figure in (row.registers, row.stack, row.spills, row.shared)),
                str(TARGETS[row.target].shared_memory),
                str(row.matrix) if row.matmul else "-",
            )
            for row in rows
        ),
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="all by default")
    parser.add_argument("--kernels", type=re.compile, default="", metavar="PATTERN", help="only names that match it")
    parser.add_argument("--changed", action="store_true", help="only what changed since the budgets were written")
    parser.add_argument("--update", action="store_true", help="take what was compiled as the new budgets")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there as well")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="compilers at a time")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, modules: Sequence[str] | None = None, path: Path = BUDGETS) -> int:
    """Returns the exit status; `modules` and `path` (of the budgets) stand in for the package's own in tests."""
    options = parse(argv)
    jobs = find_jobs(kernel_modules() if modules is None else modules, options.targets)
    jobs = [job for job in jobs if re.search(options.kernels, job.compilation.name)]
    budgets = Budgets.load(path)
    recalled = [budgets.recall(job.unknown, triton.__version__) if options.changed else None for job in jobs]
    compiled = compile_all([job for job, row in zip(jobs, recalled, strict=True) if row is None], options.processes)
    in_order = iter(compiled)
    rows = [next(in_order) if row is None else row for row in recalled]

    def asked(kernel: str, variant: str) -> bool:
        return variant.split()[0] in options.targets and bool(re.search(options.kernels, kernel))

    if options.update:
        budgets.update(rows, triton.__version__, asked)
        budgets.save(path)
    print(table(compiled))
    if options.markdown:
        options.markdown.write_text(table(rows) + "\n")
    if budgets.triton not in ("", triton.__version__):
        print(f"budgets are those of triton {budgets.triton}, this is {triton.__version__}: only the fixed rules hold")
    breaches = [line for row in rows for line in fixed_breaches(row)]
    breaches += budgets.breaches(rows, triton.__version__, asked)
    for line in breaches:
        print(f"FAIL  {line}")
    print(f"{len(compiled)} compiled, {len(rows) - len(compiled)} as they were, {len(breaches)} breaches")
    return int(bool(breaches))


if __name__ == "__main__":
    sys.exit(main())
