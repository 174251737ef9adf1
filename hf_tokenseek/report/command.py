"""`hf-tokenseek report`."""

import argparse
from pathlib import Path

from .page import PAGE, write_page


def add_parser(subparsers) -> argparse.ArgumentParser:
    """
    Adds the subcommand.

    Args:
        subparsers: what `ArgumentParser.add_subparsers` returns.
    """
    parser = subparsers.add_parser(
        "report",
        help="make report.html from one run, or compare several",
        description="Makes one self-contained page from what ReportCallback has recorded, also while a run goes on. "
        "Of a run without a record, the Trainer's log is shown.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output_dir of a run, or a checkpoint")
    parser.add_argument(
        "--output", metavar="FILE", help=f"where to write it (default: RUN/{PAGE}; of several runs, {PAGE} here)"
    )
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Writes the page and says where; raises as [`write_page`] does."""
    folder = Path(arguments.runs[0]) if len(arguments.runs) == 1 else Path()
    print(f"Written to {write_page(arguments.runs, arguments.output or folder / PAGE)}.")
