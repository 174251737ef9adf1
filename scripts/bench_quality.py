"""
Held-out loss of full fine-tuning, LoRA, fewer sequences at equal cost, and TokenSeek by score: SmolLM2-135M.

Each method has as many steps as full training, and once more as many as fit into the wall time of full training. Half
of the sequences at equal cost is therefore the row "full, half the sequences, equal time"; the one at equal steps
costs less.

    python scripts/bench_quality.py --task docstrings --bars          # times, rates, three seeds, then the table
    python scripts/bench_quality.py --task docstrings --seeds         # times only
    python scripts/bench_quality.py --task docstrings --table-only    # the table of what has been run

Every run is a cell of docs/evidence/quality-<task>.json, written when it ends: a second call goes on where the
first stopped, and runs again what would now have another learning rate or another number of steps. Learning rates are
chosen on the validation split, results are of the test split. Steps are timed first, in a phase of their own; if a
method has no times yet, those of another machine are taken again, too. The runs themselves are not timed and may share
the machine.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from bench_common import (
    EVIDENCE,
    Bar,
    Results,
    Spread,
    add_common_options,
    cell,
    collator,
    exit_status,
    in_one_line,
    judge,
    load_smollm2,
    markdown_table,
    mean_and_deviation,
    now,
)
from bench_tasks import TASKS
from bench_training import (
    batches_of,
    held_out_loss,
    marked,
    shuffled_batches,
    train_step,
    tried_rates,
    warmup_then_decay,
)
from torch import nn
from tqdm.auto import tqdm

from hf_tokenseek import attach

# learning rates to choose from: of weights, and of adapters
RATES = {False: (1e-4, 2e-4, 4e-4), True: (1e-3, 2e-3, 4e-3, 8e-3)}
# the model knows code: at those rates it only forgets
SOURCE_TEXT_RATES = {False: (1e-5, 3e-5, 1e-4, 3e-4), True: (1e-4, 3e-4, 1e-3, 3e-3)}
EQUAL_TIME = ", equal time"
FULL, SEEK = "full", "seek evidence"


@dataclass(frozen=True)
class Method:
    """
    A way to train.

    Args:
        seek (`dict`, *optional*): fields of [`SeekConfig`]; `None` trains every row.
        lora (`bool`): train rank-16 adapters on all linear layers instead of the weights.
        checkpointing (`bool`): compute every layer again in backward, otherwise full training.
        share (`float`): share of the batch's sequences to train on.
        rate_of (`str`, *optional*): use the learning rate that was chosen for this method.
    """

    seek: dict | None = None
    lora: bool = False
    checkpointing: bool = False
    share: float = 1.0
    rate_of: str | None = None


AT_EQUAL_STEPS = {
    FULL: Method(),
    "checkpointing": Method(checkpointing=True, rate_of=FULL),
    "full, half the sequences": Method(share=0.5),
    "LoRA": Method(lora=True),
    SEEK: Method(seek={}),
    "seek random": Method(seek={"score": "random"}, rate_of=SEEK),
    "seek context": Method(seek={"score": "context"}, rate_of=SEEK),
    "seek paper, ratio 0.1": Method(seek={"score": "paper", "ratio": 0.1}),
    "seek gradient, ratio 0.1": Method(seek={"score": "gradient", "ratio": 0.1}),
    "seek loss, ratio 0.1": Method(seek={"score": "loss", "ratio": 0.1}),
    "seek random, ratio 0.1": Method(seek={"score": "random", "ratio": 0.1}),
}
METHODS = AT_EQUAL_STEPS | {f"{name}{EQUAL_TIME}": method for name, method in AT_EQUAL_STEPS.items() if name != FULL}


def build(method: Method, load: Callable, seed: int) -> nn.Module:
    """A fresh model in training mode."""
    torch.manual_seed(seed)
    model, _ = load()
    if method.lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
        )
    if method.checkpointing:
        model.gradient_checkpointing_enable()
    return model.train()


class Bench:
    """
    What a cell is made from.

    Args:
        args (`argparse.Namespace`): the command line.
        load (`Callable`): gives the model and its tokenizer.
    """

    def __init__(self, args: argparse.Namespace, load: Callable):
        _, tokenizer = load()
        self.load, self.batch, self.collate = load, args.batch, collator(tokenizer.pad_token_id)
        splits = {
            split: TASKS[args.task](tokenizer, split, args.max_length) for split in ("train", "validation", "test")
        }
        self.training = splits.pop("train")
        self.held_out = {
            split: batches_of(data[: args.eval_examples], 8, self.collate) for split, data in splits.items()
        }

    def batches(self, method: Method, steps: int, seed: int) -> list[dict]:
        """What a method trains on in so many steps."""
        size = max(1, round(self.batch * method.share))
        return shuffled_batches(self.training, size, steps, seed, self.collate)

    def loss(self, method: Method, split: str, seed: int, rate: float, steps: int) -> float:
        """Held-out loss after training once; before it, if there are no steps."""
        model = build(method, self.load, seed)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
        schedule = warmup_then_decay(optimizer, steps)
        with nullcontext() if method.seek is None else attach(model, seek=method.seek) as handle:
            for step, batch in enumerate(tqdm(self.batches(method, steps, seed), leave=False, mininterval=5), 1):
                if handle is not None:
                    handle.seek.begin_step(step)
                train_step(model, batch, optimizer)
                schedule.step()
        return held_out_loss(model, self.held_out[split])

    def seconds(self, method: Method, repeats: int) -> list[float]:
        """Of `repeats` training steps, optimizer included; the first step, a warm-up, is left out."""
        model, found = build(method, self.load, 0), []
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
        with nullcontext() if method.seek is None else attach(model, seek=method.seek):
            for batch in self.batches(method, repeats + 1, 0):
                began = now()
                train_step(model, batch, optimizer)
                found.append(now() - began)
        return found[1:]


def rates_of(name: str, task: str) -> tuple[float, ...]:
    """The learning rates to choose from."""
    return (SOURCE_TEXT_RATES if task == "source-text" else RATES)[METHODS[name].lora]


def rated_as(name: str) -> str:
    """The method for which the learning rate of method `name` is chosen."""
    return METHODS[name].rate_of or name.removesuffix(EQUAL_TIME)


def tried(results: Results, name: str) -> dict[float, float]:
    """The learning rates that have been tried for a method, or the one whose rate it takes, and their losses."""
    return tried_rates(results, rated_as(name), rates_of(name, results.key["task"]))


def choice(results: Results, name: str) -> tuple[float, int]:
    """The learning rate and the number of steps of a method: those of full training, or what fits into its time."""
    losses, steps = tried(results, name), results.key["steps"]
    if name.endswith(EQUAL_TIME):
        full, own = (statistics.median(results.cells[seconds_of(n)]) for n in (FULL, name))
        steps = max(1, round(steps * full / own))
    return min(losses, key=losses.get), steps


def seconds_of(name: str) -> str:
    """The cell of a method's step times."""
    return f"seconds | {name.removesuffix(EQUAL_TIME)}"


def times_to_take(results: Results, methods: Iterable[str]) -> list[str]:
    """The cells that are missing; before them, if any is, those of another machine, which do not compare."""
    wanted = dict.fromkeys(map(seconds_of, [FULL, *methods]))
    missing = [key for key in wanted if key not in results]
    elsewhere = [key for key in map(seconds_of, AT_EQUAL_STEPS) if key in results and not results.made_here(key)]
    return [*elsewhere, *missing] if missing else []


def runs_of(results: Results, name: str) -> dict[tuple[float, int], list[float]]:
    """Held-out losses of a method, one a seed, by learning rate and steps: what differs in them is not one row."""
    found = {}
    for key, run in results.cells.items():
        if key.startswith(f"run | {name} | "):
            found.setdefault((run["rate"], run["steps"]), []).append(run["loss"])
    return found


def table(results: Results) -> str:
    """Markdown table of everything that has been run for the task."""
    rows = []
    for name in METHODS:
        for (rate, steps), losses in runs_of(results, name).items():
            seconds = Spread.of(results.cells[seconds_of(name)])
            own = [marked(rate, tried(results, name)), str(steps), str(len(losses)), mean_and_deviation(losses)]
            rows.append([name, *own, f"{seconds:.2f}", f"{seconds.median * steps:.0f}"])
    head = ["method", "learning rate", "steps", "seeds", "held-out loss", "s/step (range)", "s in all steps"]
    return markdown_table(head, rows)


def bars(results: Results) -> list[Bar]:
    """The project's bars, for the task they are set for, once several seeds have been run at one choice."""
    runs = [list(runs_of(results, name).values()) for name in (FULL, SEEK, SEEK + EQUAL_TIME)]
    if results.key["task"] != "docstrings" or any(len(own) != 1 or len(own[0]) < 2 for own in runs):
        return []
    full, steps, time = (own[0] for own in runs)
    noise = max(statistics.stdev(full), statistics.stdev(steps))
    return [
        Bar(f"{SEEK} - {FULL}, held-out loss at equal steps, within noise", _difference(steps, full), noise),
        Bar(f"{SEEK} - {FULL}, held-out loss at equal time", _difference(time, full), 0.0),
    ]


def _difference(mine: Sequence[float], other: Sequence[float]) -> float:
    return statistics.mean(mine) - statistics.mean(other)


def fill(results: Results, args: argparse.Namespace, load: Callable) -> None:
    """Runs what is missing: timing, learning rates, then seed by seed."""
    bench = Bench(args, load)
    for name in tqdm(times_to_take(results, args.methods), desc="timing"):
        results[name] = bench.seconds(METHODS[name.removeprefix("seconds | ")], args.timing_repeats)
    cell(results, "before", lambda: bench.loss(METHODS[FULL], "test", seed=0, rate=0.0, steps=0))
    if not args.seeds:
        return
    needed = dict.fromkeys(map(rated_as, args.methods))
    sweep = [(name, rate) for name in needed for rate in rates_of(name, args.task)]
    for name, rate in tqdm(sweep, desc="learning rates"):
        # another seed than those of the results
        job = partial(bench.loss, METHODS[name], "validation", seed=100, rate=rate, steps=args.rate_steps)
        cell(results, f"rate | {name} | {rate}", job)
    # seed by seed, so that an interrupted bench has whole seeds
    for seed, name in tqdm([(s, n) for s in args.seeds for n in args.methods], desc="runs"):
        rate, steps = choice(results, name)
        run = results.cells.get(f"run | {name} | {seed}")
        if run is None or (run["rate"], run["steps"]) != (rate, steps):
            loss = bench.loss(METHODS[name], "test", seed, rate, steps)
            results[f"run | {name} | {seed}"] = {"loss": loss, "steps": steps, "rate": rate}


def main(argv: Sequence[str] | None = None, load: Callable = load_smollm2) -> int:
    """Runs what is missing, prints and writes the table; `load` gives the model and its tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=sorted(TASKS), default="docstrings")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rate-steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--eval-examples", type=int, default=24)
    parser.add_argument("--timing-repeats", type=int, default=4)
    parser.add_argument("--table-only", action="store_true", help="print what has been run")
    add_common_options(parser)
    args = parser.parse_args(argv)
    settings = ("task", "steps", "rate_steps", "batch", "max_length", "eval_examples")
    key = {"model": "SmolLM2-135M-Instruct", "dtype": "fp32", **{name: getattr(args, name) for name in settings}}
    results = Results(args.output or EVIDENCE / f"quality-{args.task}.json", key, args.fresh)
    if not args.table_only:
        fill(results, args, load)
    elif "before" not in results:
        raise SystemExit(f"{results.path} has no figures of these settings. Leave out --table-only to run them.")
    found = bars(results) if args.bars else []
    sections = [
        f"# Quality: {args.task}\n\nMean ± standard deviation over seeds; * marks a rate at the edge of those tried. "
        f"Held-out loss before training: {results.cells['before']:.4f}. {in_one_line(key)}.",
        table(results),
    ]
    sections += [f"```\n{judge(found)}\n```"] if args.bars else []
    results.publish("\n\n".join([*sections, results.origins()]))
    return exit_status(found, args.strict)


if __name__ == "__main__":
    sys.exit(main())
