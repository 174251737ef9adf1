"""
How near TokenSeek's gradient is to the full gradient, by score and share: SmolLM2-135M, fp32.

    python scripts/bench_fidelity.py                          # 512 tokens, long prompts and labels everywhere
    python scripts/bench_fidelity.py --tokens 1024 --lora

Two questions, for several batches: the cosine with the full gradient of the *same* batch (what selection loses), and
with the gradient of *disjoint* sequences (what the batch is a sample of: the full gradient of a batch has a cosine
below 1 with it, too). Both also by parameter group. Results go to docs/evidence/fidelity-*.json after every
configuration; a second call goes on where the first stopped.
"""

import argparse
import statistics
from collections.abc import Iterator

import torch
from bench_common import (
    EVIDENCE,
    Bar,
    Results,
    collator,
    environment,
    in_one_line,
    judge,
    load_smollm2,
    markdown_table,
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
    """Markdown table: mean and spread over batches."""
    rows = []
    for name, figures in results.cells.items():
        if not isinstance(figures, list):
            continue
        same = [f["same batch"]["all"] for f in figures]
        groups = [f"{statistics.mean(f['same batch'][g] for f in figures):.2f}" for g in figures[0]["same batch"]][1:]
        rows.append(
            [
                name,
                f"{figures[0]['rows']:.2f}",
                f"{statistics.mean(same):.3f} ({min(same):.3f}..{max(same):.3f})",
                f"{statistics.mean(f['norm ratio'] for f in figures):.2f}",
                f"{statistics.mean(f['disjoint'] for f in figures):.3f}",
                f"{statistics.mean(f['disjoint, full batch'] for f in figures):.3f}",
                " ".join(groups),
            ]
        )
    groups = next((list(f[0]["same batch"])[1:] for f in results.cells.values() if isinstance(f, list)), [])
    head = [
        "selection",
        "k/n",
        "cosine, same batch",
        "norm ratio",
        "cosine, disjoint",
        "full batch's",
        " ".join(groups),
    ]
    return markdown_table(head, rows)


def bars(results: Results) -> list[Bar]:
    """The promises about the default selection on long prompts, as losses of cosine."""
    default = CONTEXT_OF_ADAPTERS if results.key["lora"] else CONTEXT
    figures = results.cells.get(f"evidence context={default}")
    if not figures:
        return []
    same = statistics.mean(f["same batch"]["all"] for f in figures)
    own, full = (statistics.mean(f[k] for f in figures) for k in ("disjoint", "disjoint, full batch"))
    return [
        Bar("1 - cosine with the same batch, default on long prompts", 1 - same, 0.10),
        Bar("relative loss of the full batch's cosine with disjoint data", 1 - own / full, 0.03),
    ]


def main() -> None:
    """Measures what is missing, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=list(DATA), default=list(DATA))
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--disjoint", type=int, default=64, help="disjoint sequences")
    parser.add_argument("--lora", action="store_true", help="adapters of rank 16 instead of all weights")
    args = parser.parse_args()
    torch.manual_seed(0)
    for data in args.data:
        model, tokenizer = load_smollm2()
        if args.lora:
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear"))
            # B starts at zero and would leave A without a gradient
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    nn.init.normal_(parameter, std=0.01)
        model.train()
        fill(model, tokenizer, data, args)


def fill(model: nn.Module, tokenizer, data: str, args: argparse.Namespace) -> None:
    """One data set: full gradients, the disjoint gradient, then every configuration."""
    load, configurations = DATA[data]
    settings = {name: getattr(args, name) for name in ("tokens", "batch", "batches", "disjoint", "lora")}
    suffix = f"{data}-{args.tokens}{'-lora' if args.lora else ''}"
    results = Results(EVIDENCE / f"fidelity-{suffix}.json", {"data": data, **settings})
    names = {f"{score} {name}={share}": (score, {name: share}) for score, name, share in configurations}
    if any(name not in results for name in names):
        collate = collator(tokenizer.pad_token_id)
        sequences, needed = load(tokenizer, "train", args.tokens), args.batch * args.batches + args.disjoint
        if len(sequences) < needed:
            raise SystemExit(
                f"{data} has {len(sequences)} sequences of {args.tokens} tokens, {needed} are needed. "
                "Lower --tokens, --batch, --batches or --disjoint."
            )
        starts = range(0, needed, args.batch)
        batches = [collate(sequences[start : start + args.batch]) for start in starts]
        own, others = batches[: args.batches], batches[args.batches :]
        full = [gradient(model, batch) for batch in tqdm(own, desc="full gradients", leave=False)]
        disjoint = mean_gradient(model, others)
        results["environment"] = environment()
        for name, (score, shares) in tqdm(names.items(), desc=suffix):
            if name not in results:
                results[name] = list(measure(model, own, full, disjoint, score, shares))
    verdict = f"\n\n{judge(bars(results))}" if data == "long-prompt" else ""
    results.publish(
        f"# Fidelity: {suffix}\n\nCosine of TokenSeek's gradient with the full one; mean (range) over {args.batches} "
        f"batches of {args.batch}; disjoint: {args.disjoint} other sequences. {in_one_line(results.key)}.\n\n"
        f"{table(results)}{verdict}\n\n{in_one_line(results.cells['environment'])}"
    )


if __name__ == "__main__":
    main()
