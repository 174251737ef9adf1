"""
How near TokenSeek's gradient is to the full gradient, by score and share: SmolLM2-135M, fp32.

    python scripts/bench_fidelity.py --bars                   # 512 tokens, long prompts and labels everywhere
    python scripts/bench_fidelity.py --tokens 1024 --lora --data long-prompt

Two questions, for several batches: the cosine with the full gradient of the *same* batch (what selection loses), and
with the gradient of *disjoint* sequences (what the batch is a sample of: the full gradient of a batch has a cosine
below 1 with it, too); the first also by parameter group. Results go to docs/evidence/fidelity-*.json after every
configuration; a second call goes on where the first stopped. It keeps what other versions of the code have measured;
every environment is named below the table, and --fresh measures everything in this one.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
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
from hf_tokenseek.seek.config import CONTEXT, CONTEXT_OF_ADAPTERS

GROUPS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj", "mlp": "mlp", "norm": "norm", "embed": "embed"}
LONG_PROMPT = [("evidence", "context", share) for share in (0.0, 0.05, 0.1, 0.25, 1.0)] + [
    (score, "context", 0.1) for score in ("context", "entropy", "recent", "random", "hybrid", "paper")
]
EVERYWHERE = [
    (score, "ratio", ratio)
    for ratio in (0.1, 0.3)
    for score in ("evidence", "context", "gradient", "loss", "entropy", "recent", "random", "hybrid", "paper")
]
DATA = {"long-prompt": (long_prompts, LONG_PROMPT), "labelled": (source_text, EVERYWHERE)}


def gradient(model: nn.Module, batch: dict) -> list[Tensor]:
    """Gradients of the mean loss of `batch` by trainable parameter."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(model(**batch).loss, parameters))


def mean_gradient(model: nn.Module, batches: list[dict]) -> list[Tensor]:
    """Mean of the batches' gradients."""
    total = None
    for batch in tqdm(batches, desc="disjoint sequences", leave=False):
        found = gradient(model, batch)
        total = found if total is None else torch._foreach_add(total, found)
    return torch._foreach_div(total, len(batches))


def cosines(model: nn.Module, found: list[Tensor], truth: list[Tensor]) -> dict[str, float]:
    """Cosine over all parameters, and over each group of them."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    sums = {group: torch.zeros(3, dtype=torch.float64) for group in ("all", *GROUPS)}
    for name, a, b in zip(names, found, truth, strict=True):
        products = torch.stack([(a * b).sum(), a.square().sum(), b.square().sum()]).double().cpu()
        for group, key in {"all": "", **GROUPS}.items():
            sums[group] += products * (key in name)
    # a group without trained parameters has no cosine
    return {g: float(dot / (aa * bb).sqrt()) for g, (dot, aa, bb) in sums.items() if aa > 0 and bb > 0}


def norm_ratio(found: list[Tensor], truth: list[Tensor]) -> float:
    """Norm of the selected gradient over the norm of the full one."""
    own, full = (torch.stack(torch._foreach_norm(side)).norm() for side in (found, truth))
    return float(own / full)


def measure(
    model: nn.Module, batches: list[dict], full: list, disjoint: list, score: str, shares: dict
) -> Iterator[dict]:
    """Figures of one configuration, a dict a batch."""
    config = {"score": score, "plain_fallback": False, **shares}
    with attach(model, seek=config) as handle:
        for step, (batch, truth) in enumerate(zip(batches, full, strict=True)):
            handle.seek.begin_step(step)
            found = gradient(model, batch)
            yield {
                "rows": handle.selection.shape[1] / batch["input_ids"].shape[1],
                "same batch": cosines(model, found, truth),
                "disjoint": cosines(model, found, disjoint)["all"],
                "disjoint, full batch": cosines(model, truth, disjoint)["all"],
                "norm ratio": norm_ratio(found, truth),
            }


def table(results: Results) -> str:
    """Markdown table: mean and range over batches."""
    rows, names = [], []
    for name, figures in results.cells.items():
        names = list(figures[0]["same batch"])[1:]
        own = {group: [f["same batch"][group] for f in figures] for group in ("all", *names)}
        rows.append(
            [
                name,
                f"{figures[0]['rows']:.2f}",
                mean_and_range(own.pop("all")),
                f"{statistics.mean(f['norm ratio'] for f in figures):.2f}",
                mean_and_range([f["disjoint"] for f in figures]),
                mean_and_range([f["disjoint, full batch"] for f in figures]),
                " ".join(f"{statistics.mean(values):.2f}" for values in own.values()),
            ]
        )
    head = ["selection", "k/n", "cosine, same batch", "norm ratio", "cosine, disjoint", "full batch's"]
    return markdown_table([*head, " ".join(names)], rows)


def bars(results: Results) -> list[Bar]:
    """The promises about the default selection on long prompts, as losses of cosine."""
    default = CONTEXT_OF_ADAPTERS if results.key["lora"] else CONTEXT
    figures = results.cells.get(f"evidence context={default}")
    if results.key["data"] != "long-prompt" or not figures:
        return []
    same = statistics.mean(f["same batch"]["all"] for f in figures)
    own, full = ([f[k] for f in figures] for k in ("disjoint", "disjoint, full batch"))
    by_batch = [1 - a / b for a, b in zip(own, full, strict=True)]
    where = f"by batch {min(by_batch):.3f}..{max(by_batch):.3f}"
    loss = 1 - statistics.mean(own) / statistics.mean(full)
    return [
        Bar("1 - cosine with the same batch, default on long prompts", 1 - same, 0.10),
        Bar(f"relative loss of the full batch's cosine with disjoint data ({where})", loss, 0.03),
    ]


def trainable(load: Callable, lora: bool) -> tuple[nn.Module, object]:
    """The model in training mode, with adapters that have learned something, and its tokenizer."""
    model, tokenizer = load()
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear"))
        # B starts at zero and would leave A without a gradient
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.01)
    return model.train(), tokenizer


def fill(results: Results, args: argparse.Namespace, load: Callable) -> None:
    """Measures what is missing: full gradients and the disjoint one, then every configuration."""
    load_data, configurations = DATA[results.key["data"]]
    names = {f"{score} {name}={share}": (score, {name: share}) for score, name, share in configurations}
    missing = [name for name in names if name not in results]
    if not missing:
        return
    model, tokenizer = trainable(load, args.lora)
    sequences, needed = load_data(tokenizer, "train", args.tokens), args.batch * args.batches + args.disjoint
    if len(sequences) < needed:
        raise SystemExit(
            f"{results.key['data']} has {len(sequences)} sequences of {args.tokens} tokens, {needed} are needed. "
            "Lower --tokens, --batch, --batches or --disjoint."
        )
    collate = collator(tokenizer.pad_token_id)
    batches = [collate(sequences[start : start + args.batch]) for start in range(0, needed, args.batch)]
    own, others = batches[: args.batches], batches[args.batches :]
    full = [gradient(model, batch) for batch in tqdm(own, desc="full gradients", leave=False)]
    disjoint = mean_gradient(model, others)
    for name in tqdm(missing, desc=results.path.stem):
        results[name] = list(measure(model, own, full, disjoint, *names[name]))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=list(DATA), default=list(DATA))
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--disjoint", type=int, default=64, help="disjoint sequences")
    parser.add_argument("--lora", action="store_true", help="adapters of rank 16 instead of all weights")
    add_common_options(parser)
    args = parser.parse_args(argv)
    if args.output and len(args.data) > 1:
        parser.error(f"--output is one file, --data names {len(args.data)}: {', '.join(args.data)}. Give one of them.")
    return args


def main(argv: Sequence[str] | None = None, load: Callable = load_smollm2) -> int:
    """Measures what is missing, prints and writes a table for each data set; `load` gives the model and tokenizer."""
    args, judged = parse(argv), []
    settings = {name: getattr(args, name) for name in ("tokens", "batch", "batches", "disjoint", "lora")}
    for data in args.data:
        torch.manual_seed(0)
        suffix = f"{data}-{args.tokens}{'-lora' if args.lora else ''}"
        results = Results(args.output or EVIDENCE / f"fidelity-{suffix}.json", {"data": data, **settings}, args.fresh)
        fill(results, args, load)
        found = bars(results) if args.bars else []
        sections = [
            f"# Fidelity: {suffix}\n\nCosine of TokenSeek's gradient with the full one; mean (range) over "
            f"{args.batches} batches of {args.batch}; disjoint: {args.disjoint} other sequences. "
            f"{in_one_line(results.key)}.",
            table(results),
        ]
        sections += [f"```\n{judge(found)}\n```"] if args.bars else []
        results.publish("\n\n".join([*sections, results.origins()]))
        judged += found
    return exit_status(judged, args.strict)


if __name__ == "__main__":
    sys.exit(main())
