"""
Pre-training from random weights: held-out loss, time and memory of full training, VeLoRA, GaLore and APOLLO.

    python scripts/bench_pretrain.py                      # costs, learning rates, three seeds, then the table
    python scripts/bench_pretrain.py --seeds              # costs only
    python scripts/bench_pretrain.py --table-only         # the table of what has been run
    python scripts/bench_pretrain.py --preset llama-60m   # options of recipes/pretrain.py go to every run

Every run is a cell of docs/evidence/pretrain.json, written when it ends: a second call goes on where the first
stopped. Learning rates are chosen on the validation split, results are of the test split. Time and memory are measured
first, in a phase of their own; the runs themselves are not timed and may share the machine.
"""

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bench_common import (
    EVIDENCE,
    MIB,
    Results,
    Spread,
    cell,
    in_one_line,
    markdown_table,
    mean_and_deviation,
)
from bench_training import marked, tried_rates
from tqdm.auto import tqdm
from transformers import TrainerCallback, set_seed

from recipes.pretrain import PretrainTrainer, Text, build, load_text, parse_arguments, shapes_of

# of every run, before the options from the command line
OPTIONS = (
    *("--per_device_train_batch_size", "8", "--per_device_eval_batch_size", "8", "--eval_sequences", "128"),
    *("--lr_scheduler_type", "cosine", "--warmup_steps", "0.1", "--weight_decay", "0"),
    *("--logging_strategy", "no", "--save_strategy", "no", "--report_to", "none", "--dataloader_pin_memory", "false"),
)
FULL_RATES, LOW_RANK_RATES = (1e-3, 2e-3, 4e-3), (5e-3, 1e-2, 2e-2)
# a quarter of the hidden size, as in both papers; refreshed three times in the default number of steps
LOW_RANK = ("--optim_target_modules", ".*(attn|mlp).*", "--optim_args", "rank=64,update_proj_gap=50")


@dataclass(frozen=True)
class Row:
    """
    A way to train.

    Args:
        options (`tuple[str, ...]`): of recipes/pretrain.py.
        rates (`tuple[float, ...]`): learning rates to choose from.
    """

    options: tuple[str, ...] = ()
    rates: tuple[float, ...] = FULL_RATES


def _velora(groups: int, *inputs: str) -> Row:
    return Row(("--velora", json.dumps({"groups": groups, "inputs": inputs})))


ROWS = {
    "full": Row(),
    **{f"VeLoRA {groups}, mlp + down": _velora(groups, "mlp", "down") for groups in (8, 32, 128)},
    **{f"VeLoRA {groups}, all inputs": _velora(groups, "attention", "mlp", "down") for groups in (8, 32, 128)},
    "GaLore, rank 64": Row(("--optim", "galore_adamw", *LOW_RANK), LOW_RANK_RATES),
    "APOLLO, rank 64": Row(("--optim", "apollo_adamw", *LOW_RANK), LOW_RANK_RATES),
}


class CountBytes(TrainerCallback):
    """Notes the bytes of the gradients before a step of the optimizer, and of its state after it."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        self.gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)

    def on_step_end(self, args, state, control, optimizer=None, **kwargs) -> None:
        self.optimizer = tensor_bytes(list(optimizer.state.values()))


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in it: in dicts, sequences, and objects such as GaLore's projectors."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, (list, tuple)):
        return sum(map(tensor_bytes, value))
    inside = value if isinstance(value, dict) else getattr(value, "__dict__", {})
    return sum(map(tensor_bytes, inside.values()))


class Bench:
    """
    What a cell is made from.

    Args:
        options (`Sequence[str]`): of recipes/pretrain.py, for every run.
    """

    def __init__(self, options: Sequence[str]):
        self.options = [*OPTIONS, *options]
        _, arguments, _ = parse_arguments([*self.options, "--output_dir", "."])
        self.texts = {split: load_text(replace(arguments, eval_split=split)) for split in ("validation", "test")}

    def trainer(self, row: str, text: Text, **options: str | float) -> PretrainTrainer:
        """A fresh model and its trainer; nothing is saved, so the folder stays empty."""
        own = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        with tempfile.TemporaryDirectory() as folder:
            argv = [*self.options, *ROWS[row].options, *own, "--output_dir", folder]
            model_arguments, _, training_arguments = parse_arguments(argv)
            set_seed(training_arguments.seed)
            return build(shapes_of(model_arguments), training_arguments, text)

    def costs(self, row: str, repeats: int) -> dict[str, Any]:
        """Seconds of a first step and `repeats` more, and the memory of the last."""
        trainer = self.trainer(
            row, self.texts["validation"], max_steps=repeats + 1, logging_strategy="steps", logging_steps=1
        )
        trainer.add_callback(count := CountBytes())
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        return {
            "step_seconds": [entry["speed/step_seconds"] for entry in logs],
            "saved_mib": logs[-1]["memory/saved_activations_mib"],
            "gradient_bytes": count.gradients,
            "optimizer_bytes": count.optimizer,
        }

    def loss(self, row: str, split: str, seed: int, rate: float, steps: int) -> float:
        """Held-out loss after `steps` steps; of random weights after none."""
        trainer = self.trainer(row, self.texts[split], seed=seed, learning_rate=rate, max_steps=steps)
        if steps:
            trainer.train()
        return trainer.evaluate()["eval_loss"]


def fill(results: Results, args: argparse.Namespace, options: Sequence[str]) -> None:
    """Runs what is missing: costs, learning rates, then seed by seed."""
    bench = Bench(options)
    cell(results, "before", lambda: bench.loss("full", "test", seed=0, rate=0.0, steps=0))
    for row in tqdm(args.rows, desc="costs"):
        cell(results, f"costs | {row}", lambda row=row: bench.costs(row, args.timing_repeats))
    if not args.seeds:
        return
    sweep = [(row, rate) for row in args.rows for rate in ROWS[row].rates]
    for row, rate in tqdm(sweep, desc="learning rates"):
        cell(
            results,
            f"rate | {row} | {rate}",
            # another seed than those of the results
            lambda row=row, rate=rate: bench.loss(row, "validation", seed=100, rate=rate, steps=args.rate_steps),
        )
    # seed by seed, so that an interrupted bench has whole seeds
    for seed, row in tqdm([(seed, row) for seed in args.seeds for row in args.rows], desc="runs"):
        rate = chosen_rate(results, row)
        cell(
            results,
            f"run | {row} | {seed}",
            lambda row=row, seed=seed, rate=rate: bench.loss(row, "test", seed, rate, args.steps),
        )


def chosen_rate(results: Results, row: str) -> float:
    """The learning rate with the lowest validation loss."""
    losses = tried_rates(results, row, ROWS[row].rates)
    return min(losses, key=losses.get)


def table(results: Results) -> str:
    """Markdown table of every row that has been run."""
    lines = []
    for row in ROWS:
        losses = [loss for name, loss in results.cells.items() if name.startswith(f"run | {row} | ")]
        if not losses:
            continue
        costs, rate = results.cells[f"costs | {row}"], chosen_rate(results, row)
        lines.append(
            [
                row,
                marked(rate, ROWS[row].rates),
                str(len(losses)),
                mean_and_deviation(losses),
                f"{math.exp(statistics.mean(losses)):.1f}",
                f"{costs['step_seconds'][0]:.2f}",
                f"{Spread.of(costs['step_seconds'][1:]):.2f}",
                f"{costs['saved_mib']:.1f}",
                f"{costs['gradient_bytes'] / MIB:.1f}",
                f"{costs['optimizer_bytes'] / MIB:.1f}",
            ]
        )
    head = ["method", "learning rate", "seeds", "held-out loss", "perplexity", "first step s", "s/step (range)"]
    return markdown_table([*head, "saved activations MiB", "gradients MiB", "optimizer state MiB"], lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is missing, then prints and writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # the recipe's --seed is not short for --seeds
        allow_abbrev=False,
    )
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rate-steps", type=int, default=75)
    parser.add_argument("--timing-repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=EVIDENCE / "pretrain.json", help="the table goes beside it")
    parser.add_argument("--table-only", action="store_true", help="print what has been run")
    args, options = parser.parse_known_args(argv)
    key = {"steps": args.steps, "rate_steps": args.rate_steps, "options": " ".join([*OPTIONS, *options])}
    results = Results(args.output, key)
    if not args.table_only:
        fill(results, args, options)
    results.publish(
        "# Pre-training\n\nMean ± standard deviation over seeds; * marks a rate at the edge of its grid. The first "
        "step warms up, has GaLore's decomposition, which comes again every 50 steps, and VeLoRA's first look at its "
        "inputs. "
        f"Held-out loss before training: {results.cells['before']:.4f}. {in_one_line(key)}.\n\n{table(results)}\n\n"
        f"{results.origins()}"
    )


if __name__ == "__main__":
    main()
