"""
Held-out loss of full fine-tuning, LoRA, fewer sequences at equal cost, and TokenSeek by score: SmolLM2-135M.

    python scripts/bench_quality.py --task docstrings                 # learning rates, then three seeds, then the table
    python scripts/bench_quality.py --task docstrings --table-only    # the table of what has been run

Every run is one JSON line in docs/evidence/quality-<task>.jsonl, written when it ends: a second call goes on where the
first stopped. Learning rates are chosen on the validation split, results are of the test split. Steps are timed in a
phase of its own with the methods taking turns, because the runs themselves may share the machine.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from recipes.data import PadCollator  # noqa: E402  (the repository is not a package)
from recipes.models import load_smollm2  # noqa: E402
from scripts.bench_common import environment, markdown_table  # noqa: E402
from scripts.bench_tasks import TASKS  # noqa: E402

from hf_tokenseek import attach  # noqa: E402
from hf_tokenseek.seek import SeekConfig  # noqa: E402


FULL_RATES, LORA_RATES = (5e-5, 1e-4, 2e-4), (5e-4, 1e-3, 2e-3)


@dataclass(frozen=True)
class Method:
    """
    A way to train.

    Args:
        seek (`dict`, *optional*): fields of [`SeekConfig`]; `None` trains every row.
        lora (`bool`): train rank-16 adapters on all linear layers instead of the weights.
        share (`float`): share of the batch's sequences to train on.
        equal_time (`bool`): take as many more steps as fit into the wall time of full training.
        rate_of (`str`, *optional*): use the learning rate that was chosen for this method.
    """

    seek: dict | None = None
    lora: bool = False
    share: float = 1.0
    equal_time: bool = False
    rate_of: str | None = None


METHODS = {
    "full": Method(),
    "seek evidence": Method(seek={}),
    "seek evidence, equal time": Method(seek={}, equal_time=True, rate_of="seek evidence"),
    "full, half the sequences": Method(share=0.5),
    "LoRA": Method(lora=True),
    "seek random": Method(seek={"score": "random"}),
    "seek context": Method(seek={"score": "context"}),
    "seek paper, ratio 0.1": Method(seek={"score": "paper", "ratio": 0.1}),
    "seek gradient, ratio 0.1": Method(seek={"score": "gradient", "ratio": 0.1}),
    "seek loss, ratio 0.1": Method(seek={"score": "loss", "ratio": 0.1}),
    "seek random, ratio 0.1": Method(seek={"score": "random", "ratio": 0.1}),
}


def build(method: Method, seed: int) -> tuple[nn.Module, object]:
    """A fresh model in training mode and its tokenizer."""
    torch.manual_seed(seed)
    model, tokenizer = load_smollm2()
    if method.lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"))
    return model.train(), tokenizer


def held_out_loss(model: nn.Module, batches: list[dict]) -> float:
    """Mean cross-entropy over the labelled tokens of `batches`."""
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for batch in batches:
            labelled = int((batch["labels"][:, 1:] != -100).sum())
            total, count = total + float(model(**batch).loss) * labelled, count + labelled
    model.train()
    return total / count


def batches_of(data: list[dict], size: int, collate: Callable) -> list[dict]:
    """All of `data` in batches, in order."""
    return [collate(data[i : i + size]) for i in range(0, len(data), size)]


def shuffled_batches(data: list[dict], size: int, steps: int, seed: int, collate: Callable) -> list[dict]:
    """`steps` batches, reshuffled every epoch; the same for every method that has the same `size`."""
    generator, order = torch.Generator().manual_seed(seed), []
    while len(order) < steps * size:
        order += torch.randperm(len(data), generator=generator).tolist()
    return batches_of([data[i] for i in order[: steps * size]], size, collate)


def train_step(model: nn.Module, batch: dict, optimizer: torch.optim.Optimizer) -> float:
    """Forward under bf16 autocast (weights stay fp32), backward, clip at 1, AdamW."""
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def run(method: Method, rate: float, seed: int, steps: int, train: Callable, evaluate: Callable) -> list[tuple]:
    """
    Trains once.

    Returns:
        `list[tuple[int, float]]`: held-out loss at five points from the start to the last step.
    """
    model, _ = build(method, seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warmup, (steps - s) / max(1, steps - warmup))
    )
    marks = {round(steps * part / 2) for part in (1, 2)}
    curve = [(0, evaluate(model))]
    with nullcontext() if method.seek is None else attach(model, seek=method.seek) as handle:
        for step, batch in enumerate(tqdm(train(steps, method.share, seed), leave=False, mininterval=5), 1):
            if handle is not None:
                handle.seek.begin_step(step)
            train_step(model, batch, optimizer)
            schedule.step()
            if step in marks:
                curve.append((step, evaluate(model)))
    return curve


def time_steps(methods: list[str], batch_for: Callable, repeats: int) -> dict[str, list[float]]:
    """Seconds of `repeats` training steps of each method; the methods take turns on one model, optimizer included."""
    seconds = {name: [] for name in methods}
    for name in tqdm(methods, desc="timing"):
        method = METHODS[name]
        model, _ = build(method, 0)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
        with nullcontext() if method.seek is None else attach(model, seek=method.seek):
            for index, batch in enumerate(batch_for(repeats + 1, method.share, 0)):
                began = time.perf_counter()
                train_step(model, batch, optimizer)
                if index:  # the first step warms up
                    seconds[name].append(time.perf_counter() - began)
    return seconds


class Log:
    """Results as JSON lines, each under a key; what is there is not run again."""

    def __init__(self, path: Path):
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.entries = {tuple(e["key"]): e["value"] for e in map(json.loads, lines)}

    def get(self, key: tuple, make: Callable):
        """The value of `key`, made and written if it is not there yet."""
        key = tuple(key)
        if key not in self.entries:
            self.entries[key] = make()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps({"key": key, "value": self.entries[key], "environment": environment()}) + "\n")
        return self.entries[key]


def chosen_rate(log: Log, name: str, args) -> float | None:
    """The learning rate with the lowest validation loss, if all candidates have been run."""
    name = METHODS[name].rate_of or name
    rates = LORA_RATES if METHODS[name].lora else FULL_RATES
    found = {r: log.entries.get(("rate", name, r, args.rate_steps)) for r in rates}
    return min(found, key=lambda r: found[r][-1][1]) if all(found.values()) else None


def table(log: Log, args) -> str:
    """Markdown table of everything that has been run for the task."""
    rows = []
    for name in METHODS:
        runs = [v for k, v in sorted(log.entries.items(), key=str) if k[:2] == ("run", name)]
        if not runs:
            continue
        ends = [curve[-1][1] for curve in runs]
        seconds = log.entries.get(("seconds",), {}).get(METHODS[name].rate_of or name)
        median = statistics.median(seconds) if seconds else math.nan
        steps = runs[0][-1][0]
        spread = f"{statistics.mean(ends):.4f} ± {statistics.stdev(ends) if len(ends) > 1 else math.nan:.4f}"
        rate = chosen_rate(log, name, args)
        rows.append([name, f"{rate:g}", str(steps), str(len(ends)), f"{runs[0][0][1]:.4f}", spread, f"{median:.2f}", f"{median * steps:.0f}"])
    head = ["method", "learning rate", "steps", "seeds", "loss before", "held-out loss after", "s/step", "s in steps"]
    return markdown_table(head, rows)


def main() -> None:
    """Runs what is missing, then prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=sorted(TASKS), default="docstrings")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--rate-steps", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--eval-examples", type=int, default=48)
    parser.add_argument("--timing-repeats", type=int, default=5)
    parser.add_argument("--phases", nargs="+", default=["time", "rates", "runs"], choices=["time", "rates", "runs"])
    parser.add_argument("--table-only", action="store_true")
    args = parser.parse_args()
    log = Log(ROOT / "docs" / "evidence" / f"quality-{args.task}.jsonl")
    if not args.table_only:
        fill(log, args)
    text = table(log, args)
    print(text)
    (log.path.with_suffix(".md")).write_text(
        f"# Quality: {args.task}\n\nSmolLM2-135M, {args.max_length} tokens, batch {args.batch}, bf16 autocast on fp32 "
        f"weights, AdamW; mean ± standard deviation over seeds.\n\n{text}\n\n{environment()}\n"
    )


def fill(log: Log, args) -> None:
    """Runs the phases asked for: timing, learning rates, seeds."""
    _, tokenizer = load_smollm2()
    splits = {split: TASKS[args.task](tokenizer, split, args.max_length) for split in ("train", "validation", "test")}
    collate = PadCollator(tokenizer.pad_token_id)

    def train(steps: int, share: float, seed: int) -> list[dict]:
        return shuffled_batches(splits["train"], max(1, round(args.batch * share)), steps, seed, collate)

    def evaluator(split: str) -> Callable:
        batches = batches_of(splits[split][: args.eval_examples], 8, collate)
        return lambda model: held_out_loss(model, batches)

    timed = [n for n in args.methods if METHODS[n].rate_of is None]
    if "time" in args.phases:
        log.get(("seconds",), lambda: time_steps(timed, train, args.timing_repeats))
    if "rates" in args.phases:
        sweep = [(n, r) for n in timed for r in (LORA_RATES if METHODS[n].lora else FULL_RATES)]
        for name, rate in tqdm(sweep, desc="learning rates"):
            key = ("rate", name, rate, args.rate_steps)
            log.get(key, lambda n=name, r=rate: run(METHODS[n], r, 100, args.rate_steps, train, evaluator("validation")))
    if "runs" in args.phases:
        # seed by seed, so that an interrupted bench has whole seeds
        for seed, name in tqdm([(s, n) for s in args.seeds for n in args.methods], desc="runs"):
            steps, rate = args.steps, chosen_rate(log, name, args)
            if METHODS[name].equal_time:
                seconds = log.entries[("seconds",)]
                own, full = (statistics.median(seconds[n]) for n in (METHODS[name].rate_of, "full"))
                steps = round(steps * full / own)
            log.get(
                ("run", name, seed, steps),
                lambda n=name, r=rate, s=seed, k=steps: run(METHODS[n], r, s, k, train, evaluator("test")),
            )


if __name__ == "__main__":
    main()
