"""`hf-tokenseek`: what a training run will need, which way of training fits, what a run did."""

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from .report.command import add_parser as add_report

MISTAKES = (ValueError, OSError, ModuleNotFoundError)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; a user's mistake ends it with one line and exit status 2."""
    parser = argparse.ArgumentParser(prog="hf-tokenseek", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_estimate(commands)
    add_fit(commands)
    add_report(commands)
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments) or 0
    except MISTAKES as error:
        print(f"hf-tokenseek: error: {error}", file=sys.stderr)
        return 2


def add_estimate(subparsers) -> None:
    """Adds `estimate` to what `ArgumentParser.add_subparsers` returns."""
    parser = subparsers.add_parser(
        "estimate",
        help="memory of a training step, simulated without a GPU",
        description="Runs one training step of the real model, methods and optimizer on tensors without data.",
    )
    _add_training(parser, "bf16", "weights in bf16 or fp32, or mixed: fp32 weights, bf16 products")
    parser.add_argument(
        "--method",
        action="append",
        default=[],
        metavar="NAME[=JSON]",
        help="seek, lean, velora=..., as in attach(); may be repeated. None is plain training",
    )
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--gpu", metavar="SIZE", help="memory to compare the peak with, e.g. 24GiB")
    parser.set_defaults(run=_later("run_estimate"))


def add_fit(subparsers) -> None:
    """Adds `fit`, likewise."""
    parser = subparsers.add_parser(
        "fit",
        help="the first way of training that fits into a GPU, as options of recipes/sft.py",
        description="Tries ways of training in an order of preference, exact before approximate, and prints the first "
        "that fits as YAML. What is trained stays as it is: all weights, or adapters with --lora.",
    )
    # the recipe's weights are float32
    _add_training(parser, "mixed", "mixed (fp32 weights, bf16 products) or fp32")
    parser.add_argument("--gpu", metavar="SIZE", required=True, help="memory there is, e.g. 24GiB")
    parser.set_defaults(run=_later("run_fit"))


def _add_training(parser: argparse.ArgumentParser, dtype: str, dtypes: str) -> None:
    add = parser.add_argument
    add("--model", required=True, help="name or folder of a model, or its config.json")
    add("--seq", type=int, required=True, help="tokens of a sequence")
    add("--batch", type=int, default=1, help="sequences of a micro-batch (default: 1)")
    add("--labelled", type=float, default=0.05, help="share of labelled tokens, at the end (default: 0.05)")
    add("--lora", type=int, metavar="RANK", help="LoRA on all linear layers; all weights train if not given")
    add("--load-in-4bit", action="store_true", help="with --lora: the frozen linear layers in NF4 (QLoRA)")
    add("--optimizer", default="adamw_torch_fused", help="as the Trainer's `optim` (default: adamw_torch_fused)")
    add("--dtype", default=dtype, help=f"{dtypes} (default: {dtype})")
    add("--device", default="cuda", help="whose kernels: cuda or cpu (default: cuda)")
    add("--strategy", help="zero1, zero2, zero3 or fsdp: what --ranks divide, by arithmetic")
    add("--ranks", type=int, default=1, help="processes (default: 1)")
    add("--headroom", type=float, default=0.08, help="share of --gpu left to what is not modelled (default: 0.08)")
    add("--json", action="store_true", help="print JSON")


def _later(name: str) -> Callable[[argparse.Namespace], int]:
    """Imports torch when a command runs, not when its help is asked for."""
    return lambda arguments: getattr(import_module(".memory.command", __package__), name)(arguments)


if __name__ == "__main__":
    sys.exit(main())
