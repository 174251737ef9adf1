"""
LeMo: what SmolLM2-135M with LoRA has learned after training with dropped tokens, with all tokens and without them.

    python scripts/bench_lemo_quality.py --task text       # perplexity on the standard library's source files
    python scripts/bench_lemo_quality.py --task needle     # a sentence in a long text, and a question about it

What stands in docs/evidence was made by

    python scripts/bench_lemo_quality.py --task text --steps 10 --eval-examples 3 --methods dense "keep 0.4" --bars

Adapters are judged by the plain model and by the sparse one (whose loss is that of the tokens it computes), at several
lengths. Interrupted, it goes on with the first cell that is not finished.
"""

import argparse
import random
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
from bench_common import (
    EVIDENCE,
    Bar,
    Results,
    add_common_options,
    cell,
    collator,
    exit_status,
    in_one_line,
    judge,
    load_smollm2,
    markdown_table,
    mean_and_deviation,
)
from bench_tasks import Encoded, source_text
from bench_training import shuffled_batches, warmup_then_decay
from bench_velora import Row, build, prepared
from torch import nn
from tqdm.auto import tqdm

from hf_tokenseek import attach
from hf_tokenseek.seek.batch import IGNORE
from recipes.data import encode
from recipes.source_text import source_files

PUBLISHED = {"dense_first": 15, "dense_last": 1, "rescore": 1, "queries": "all", "mlp": "dense", "loss": "all"}
DENSE, LEMO = "dense", "keep 0.4"
METHODS = {
    DENSE: Row(DENSE, lora=True),
    LEMO: Row(LEMO, {"lemo": {"keep": 0.4}}, lora=True),
    "keep 0.4, detach": Row("keep 0.4, detach", {"lemo": {"keep": 0.4, "mode": "detach"}}, lora=True),
    "keep 0.4, as published": Row("keep 0.4, as published", {"lemo": {"keep": 0.4, **PUBLISHED}}, lora=True),
}
# source text is known to the model: larger rates only make it forget
RATES = {"text": 1e-4, "needle": 5e-4}
QUESTION = "What is the secret code of the {thing}?"
NEEDLE = "# The secret code of the {thing} is {code}."
THINGS = ("garden", "harbour", "library", "station", "bakery", "museum", "tower", "bridge", "cellar", "market")


def needles(tokenizer, split: str, length: int, count: int) -> Encoded:
    """Source files of about `length` tokens with a needle at a random depth, and a question about it at the end."""
    draw, found = random.Random(f"{split} {length}"), []
    for file in source_files(split):
        ids = tokenizer(file[: length * 8], add_special_tokens=False)["input_ids"]
        if len(ids) < length:
            continue
        # room for the question, the needle and the answer
        text = tokenizer.decode(ids[: length - 100])
        lines = text.splitlines()
        thing, code = draw.choice(THINGS), str(draw.randrange(1000, 10000))
        lines.insert(draw.randrange(len(lines) + 1), NEEDLE.format(thing=thing, code=code))
        prompt = "\n".join([*lines, "", QUESTION.format(thing=thing)])
        found.append(encode({"prompt": prompt, "completion": code}, tokenizer, length))
        if len(found) == count:
            break
    return found


def load_task(task: str, tokenizer, split: str, length: int, count: int) -> Encoded:
    """At most `count` sequences of a task."""
    if task == "needle":
        return needles(tokenizer, split, length, count)
    return source_text(tokenizer, split, length)[:count]


def train(row: Row, load: Callable, seed: int, batches: Sequence[dict], rate: float) -> nn.Module:
    """LoRA trained the row's way."""
    model = build(row, load, seed)
    with prepared(model, row, row.methods) as handle:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
        schedule = warmup_then_decay(optimizer, len(batches))
        for step, batch in enumerate(tqdm(batches, desc=row.name, leave=False, mininterval=5)):
            if handle is not None:
                handle.lemo.begin_step(step)
            model(**batch).loss.backward()
            nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return model


@torch.no_grad()
def judge_on(model: nn.Module, batches: Sequence[dict]) -> dict[str, float]:
    """Mean loss over labelled tokens, and the share of sequences whose labels are all the likeliest tokens."""
    total, count, right = 0.0, 0, 0
    for batch in batches:
        output = model(**batch)
        targets = batch["labels"][:, 1:]
        labelled = targets != IGNORE
        total, count = total + output.loss.item() * int(labelled.sum()), count + int(labelled.sum())
        right += int(((output.logits[:, :-1].argmax(-1) == targets) | ~labelled).all())
    return {"loss": total / count, "right": right / len(batches)}


def evaluate(model: nn.Module, held_out: dict[int, list[dict]]) -> dict[str, dict]:
    """By length: the plain model, and the sparse one."""
    model.eval()
    found = {f"plain | {n}": judge_on(model, batches) for n, batches in held_out.items()}
    with attach(model, **METHODS[LEMO].methods) as handle, handle.lemo.everywhere():
        found |= {f"sparse | {n}": judge_on(model, batches) for n, batches in held_out.items()}
    return found


def train_and_evaluate(row: Row, load, seed: int, batches, rate: float, held_out) -> dict[str, dict]:
    """What one run has learned."""
    return evaluate(train(row, load, seed, batches, rate), held_out)


def runs_of(results: Results, method: str) -> list[dict]:
    """The finished runs of a method."""
    return [found for key, found in results.cells.items() if key.startswith(f"run | {method} | ")]


def table(results: Results, lengths: Sequence[int]) -> str:
    """Held-out loss and, for needles, the share of right answers."""
    needle = results.key["task"] == "needle"
    columns = [f"{kind} | {n}" for kind in ("plain", "sparse") for n in lengths]
    lines = [["before training", "", *(_cell([results.cells["before"]], column, needle) for column in columns)]]
    for method in METHODS:
        if runs := runs_of(results, method):
            lines.append([method, str(len(runs)), *(_cell(runs, column, needle) for column in columns)])
    return markdown_table(["method", "seeds", *(column.replace(" | ", " model, ") for column in columns)], lines)


def _cell(runs: Sequence[dict], column: str, needle: bool) -> str:
    losses = mean_and_deviation([run[column]["loss"] for run in runs])
    right = sum(run[column]["right"] for run in runs) / len(runs)
    return f"{losses}; {right:.2f} right" if needle else losses


def bars(results: Results, lengths: Sequence[int]) -> list[Bar]:
    """Perplexity of the plain model with either adapter."""
    if results.key["task"] != "text":
        return []

    def perplexity(method: str, n: int) -> float:
        losses = [run[f"plain | {n}"]["loss"] for run in runs_of(results, method)]
        return torch.tensor(losses).mean().exp().item()

    return [
        Bar(f"perplexity at {n}: keep 0.4 / dense", perplexity(LEMO, n) / perplexity(DENSE, n), 1.02) for n in lengths
    ]


def main(argv: Sequence[str] | None = None, load: Callable = load_smollm2) -> int:
    """Runs what is missing, prints and writes the table; `load` gives the model and its tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=sorted(RATES), default="text")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--eval-examples", type=int, default=4)
    add_common_options(parser)
    args = parser.parse_args(argv)
    settings = ("task", "steps", "max_length", "lengths", "eval_examples")
    key = {"model": "SmolLM2-135M-Instruct", "dtype": "fp32", **{name: getattr(args, name) for name in settings}}
    results = Results(args.output or EVIDENCE / f"bench_lemo_{args.task}.json", key, args.fresh)
    _, tokenizer = load()
    collate = collator(tokenizer.pad_token_id)
    training = load_task(args.task, tokenizer, "train", args.max_length, args.steps * 8)
    held_out = {
        n: [collate([record]) for record in load_task(args.task, tokenizer, "test", n, args.eval_examples)]
        for n in args.lengths
    }
    cell(results, "before", lambda: evaluate(build(METHODS[DENSE], load), held_out))
    for seed, method in tqdm([(s, m) for s in args.seeds for m in args.methods], desc="runs"):
        batches = shuffled_batches(training, 1, args.steps, seed, collate)
        job = partial(train_and_evaluate, METHODS[method], load, seed, batches, RATES[args.task], held_out)
        cell(results, f"run | {method} | {seed}", job)
    found = bars(results, args.lengths) if args.bars else []
    results.publish(
        f"# LeMo: quality, {args.task}\n\nHeld-out loss after training, mean ± standard deviation over seeds. "
        f"{in_one_line(key)}, learning rate {RATES[args.task]:g}; as published: {PUBLISHED}.\n\n"
        f"{table(results, args.lengths)}\n\n```\n{judge(found)}\n```\n\n{results.origins()}"
    )
    return exit_status(found, args.strict)


if __name__ == "__main__":
    sys.exit(main())
