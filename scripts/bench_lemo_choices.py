"""
LeMo's defaults and what the paper does instead: how far SmolLM2-135M's loss moves when layers drop tokens, untrained.

    python scripts/bench_lemo_choices.py --bars               # 8 sequences of 1,024 tokens each, some minutes
    python scripts/bench_lemo_choices.py --tokens 512

Forward passes only, keep 0.4: the sparse model's loss beside the plain model's loss of the same labels, on long
prompts with short answers and on source text with labels everywhere. Each row departs from the defaults in what it
names. Interrupted, it goes on with the first row that is not finished.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from bench_common import (
    EVIDENCE,
    Bar,
    Results,
    add_common_options,
    collator,
    exit_status,
    in_one_line,
    judge,
    load_smollm2,
    markdown_table,
    mean_and_range,
)
from bench_tasks import long_prompts, source_text
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_tokenseek import attach
from hf_tokenseek.seek.batch import IGNORE

LONG_PROMPT, SOURCE_TEXT = "long-prompt", "source-text"
DATA = {LONG_PROMPT: long_prompts, SOURCE_TEXT: source_text}
KEEP = 0.4
DEFAULTS, RESCORE, ALL_QUERIES, ALL_LABELS = "defaults", "rescore 1", "queries all", "loss all"
CHOICES = {
    DEFAULTS: {},
    RESCORE: {"rescore": 1},
    ALL_QUERIES: {"queries": "all"},
    "queries later": {"queries": "later"},
    ALL_LABELS: {"loss": "all"},
    "as published: rescore 1, queries all, loss all": {"rescore": 1, "queries": "all", "loss": "all"},
    "score oracle": {"score": "oracle"},
    "score previous_layer": {"score": "previous_layer"},
    "score random": {"score": "random"},
    "score recency": {"score": "recency"},
}
# docs/lemo.md gives these as reasons for the defaults
REASONS = ((LONG_PROMPT, RESCORE), (SOURCE_TEXT, ALL_QUERIES), (SOURCE_TEXT, ALL_LABELS))


def losses_by_position(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of what each position predicts, `(batch, n - 1)`; 0 without a label."""
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")


@torch.no_grad()
def plain_losses(model: nn.Module, batches: Sequence[dict]) -> list[Tensor]:
    """The plain model's loss of every label, by sequence."""
    return [losses_by_position(model(**batch).logits, batch["labels"]) for batch in batches]


@torch.no_grad()
def measure(
    model: nn.Module, batches: Sequence[dict], plain: Sequence[Tensor], choice: dict
) -> list[dict[str, float]]:
    """The sparse model's loss, the plain one's of the labels that count in it, and their share, by sequence."""
    found = []
    with attach(model, lemo={"keep": KEEP, **choice}) as handle, handle.lemo.everywhere():
        for batch, losses in zip(batches, plain, strict=True):
            sparse = model(**batch).loss.item()
            labelled = batch["labels"][:, 1:] != IGNORE
            counted = labelled
            if handle.lemo.leaves_out_labels:
                counted = labelled & handle.lemo.elimination.computed()[:, :-1]
            share = counted.sum() / labelled.sum()
            found.append({"sparse": sparse, "plain": losses[counted].mean().item(), "share": share.item()})
    return found


def fill(results: Results, data: str, args: argparse.Namespace, load: Callable) -> None:
    """Measures what is missing on one data set."""
    missing = {name: choice for name, choice in CHOICES.items() if f"{data} | {name}" not in results}
    if not missing:
        return
    model, tokenizer = load()
    model.eval()
    sequences = DATA[data](tokenizer, "test", args.tokens)
    if len(sequences) < args.sequences:
        raise SystemExit(
            f"{data} has {len(sequences)} sequences of {args.tokens} tokens, {args.sequences} are asked for. "
            "Lower --sequences or --tokens."
        )
    collate = collator(tokenizer.pad_token_id)
    batches = [collate([sequence]) for sequence in sequences[: args.sequences]]
    plain = plain_losses(model, batches)
    for name, choice in tqdm(missing.items(), desc=data):
        results[f"{data} | {name}"] = measure(model, batches, plain, choice)


def moves(figures: Sequence[dict[str, float]]) -> list[float]:
    """How far the loss moves, by sequence."""
    return [abs(figure["sparse"] - figure["plain"]) for figure in figures]


def table(results: Results, data: str) -> str:
    """What each choice does to the loss."""
    rows = []
    for name in CHOICES:
        figures = results.cells[f"{data} | {name}"]
        sparse, plain, share = ([figure[column] for figure in figures] for column in ("sparse", "plain", "share"))
        means = [f"{statistics.mean(share):.2f}", *(f"{statistics.mean(losses):.3f}" for losses in (plain, sparse))]
        rows.append([name, *means, mean_and_range(moves(figures))])
    head = ["choice", "labels that count", "their plain loss", "sparse loss", "moves by (range)"]
    return markdown_table(head, rows)


def bars(results: Results) -> list[Bar]:
    """The defaults move the loss less than what they were chosen instead of."""
    found = []
    for data, name in REASONS:
        own, other = (statistics.mean(moves(results.cells[f"{data} | {n}"])) for n in (DEFAULTS, name))
        found.append(Bar(f"{data}: loss moves by, {DEFAULTS} / {name}", own / other, 1.0))
    return found


def main(argv: Sequence[str] | None = None, load: Callable = load_smollm2) -> int:
    """Measures what is missing, prints and writes the tables; `load` gives the model and its tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--sequences", type=int, default=8)
    add_common_options(parser)
    args = parser.parse_args(argv)
    key = {"model": "SmolLM2-135M-Instruct", "dtype": "fp32", "tokens": args.tokens, "sequences": args.sequences}
    results = Results(args.output or EVIDENCE / "bench_lemo_choices.json", key, args.fresh)
    for data in DATA:
        fill(results, data, args, load)
    found = bars(results) if args.bars else []
    sections = [
        f"# LeMo: its defaults\n\nForward passes of the pre-trained model, keep {KEEP}. Mean over sequences; moves "
        f"by: mean (range) of the absolute difference between sparse and plain loss of a sequence. {in_one_line(key)}."
    ]
    sections += [f"## {data}\n\n{table(results, data)}" for data in DATA]
    sections += [f"## Bars\n\n```\n{judge(found)}\n```"] if args.bars else []
    results.publish("\n\n".join([*sections, results.origins()]))
    return exit_status(found, args.strict)


if __name__ == "__main__":
    sys.exit(main())
