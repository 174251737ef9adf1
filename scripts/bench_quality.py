"""
Held-out loss of full fine-tuning, LoRA, fewer sequences at equal cost, and TokenSeek by score: SmolLM2-135M.

Each method has as many steps as full training, and once more as many as fit into the wall time of full training.

    python scripts/bench_quality.py --task docstrings                 # times, rates, three seeds, then the table
    python scripts/bench_quality.py --task docstrings --seeds         # times only
    python scripts/bench_quality.py --task docstrings --table-only    # the table of what has been run

Every run is a cell of docs/evidence/quality-<task>.json, written when it ends: a second call goes on where the
first stopped. Learning rates are chosen on the validation split, results are of the test split. Steps are timed first,
in a phase of their own; the runs themselves are not timed and may share the machine.
"""

import argparse
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from bench_common import (
    EVIDENCE,
    Results,
    Spread,
    cell,
    collator,
    environment,
    in_one_line,
    load_smollm2,
    markdown_table,
    mean_and_deviation,
    now,
)
from bench_tasks import TASKS
from torch import nn
from tqdm.auto import tqdm

from hf_tokenseek import attach

# learning rates to choose from: of weights, and of adapters
RATES = {False: (1e-4, 2e-4, 4e-4), True: (1e-3, 2e-3, 4e-3)}
# the model knows code: at those rates it only forgets
SOURCE_TEXT_RATES = {False: (1e-5, 3e-5, 1e-4, 3e-4), True: (1e-4, 3e-4, 1e-3, 3e-3)}
EQUAL_TIME = ", equal time"


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
    "full": Method(),
    "checkpointing": Method(checkpointing=True, rate_of="full"),
    "full, half the sequences": Method(share=0.5),
    "LoRA": Method(lora=True),
    "seek evidence": Method(seek={}),
    "seek random": Method(seek={"score": "random"}, rate_of="seek evidence"),
    "seek context": Method(seek={"score": "context"}, rate_of="seek evidence"),
    "seek paper, ratio 0.1": Method(seek={"score": "paper", "ratio": 0.1}),
    "seek gradient, ratio 0.1": Method(seek={"score": "gradient", "ratio": 0.1}),
    "seek loss, ratio 0.1": Method(seek={"score": "loss", "ratio": 0.1}),
    "seek random, ratio 0.1": Method(seek={"score": "random", "ratio": 0.1}),
}
METHODS = AT_EQUAL_STEPS | {f"{name}{EQUAL_TIME}": method for name, method in AT_EQUAL_STEPS.items() if name != "full"}


def build(method: Method, seed: int) -> nn.Module:
    """A fresh model in training mode."""
    torch.manual_seed(seed)
    model, _ = load_smollm2()
    if method.lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
        )
    if method.checkpointing:
        model.gradient_checkpointing_enable()
    return model.train()


def held_out_loss(model: nn.Module, batches: list[dict]) -> float:
    """Mean cross-entropy over the labelled tokens of `batches`."""
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
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
    """Forward, backward, clip at 1, AdamW, all in fp32."""
    loss = model(**batch).loss
    loss.backward()
    nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def warmup_then_decay(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up over a tenth of the steps, then linear decay to zero."""
    warmup = max(1, steps // 10)
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warmup, (steps - s) / max(1, steps - warmup))
    )


def run(method: Method, rate: float, seed: int, steps: int, train: Callable, evaluate: Callable) -> float:
    """
    Trains once.

    Returns:
        `float`: held-out loss after the last step.
    """
    model = build(method, seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    schedule = warmup_then_decay(optimizer, steps)
    with nullcontext() if method.seek is None else attach(model, seek=method.seek) as handle:
        for step, batch in enumerate(tqdm(train(steps, method.share, seed), leave=False, mininterval=5), 1):
            if handle is not None:
                handle.seek.begin_step(step)
            train_step(model, batch, optimizer)
            schedule.step()
    return evaluate(model)


def time_steps(batch_for: Callable, repeats: int) -> dict[str, list[float]]:
    """Seconds of `repeats` training steps of each method, optimizer included; the first, a warm-up, is left out."""
    seconds = {name: [] for name in AT_EQUAL_STEPS}
    for name, method in tqdm(AT_EQUAL_STEPS.items(), desc="timing"):
        model = build(method, 0)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
        with nullcontext() if method.seek is None else attach(model, seek=method.seek):
            for index, batch in enumerate(batch_for(repeats + 1, method.share, 0)):
                began = now()
                train_step(model, batch, optimizer)
                if index:  # the first step warms up
                    seconds[name].append(now() - began)
    return seconds


def rates_of(name: str, task: str) -> tuple[float, ...]:
    """The learning rates to choose from."""
    return (SOURCE_TEXT_RATES if task == "source-text" else RATES)[METHODS[name].lora]


def rated_as(name: str) -> str:
    """The method for which the learning rate of method `name` is chosen."""
    return METHODS[name].rate_of or name.removesuffix(EQUAL_TIME)


def chosen_rate(results: Results, name: str) -> float:
    """The learning rate with the lowest validation loss of this method, or of the one whose rate it takes."""
    name = rated_as(name)
    return min(rates_of(name, results.key["task"]), key=lambda rate: results.cells[f"rate | {name} | {rate}"])


def steps_in_equal_time(results: Results, name: str, steps: int) -> int:
    """How many steps of a method take the time of `steps` steps of full training."""
    full, own = (statistics.median(results.cells["seconds"][n]) for n in ("full", name.removesuffix(EQUAL_TIME)))
    return round(steps * full / own)


def table(results: Results) -> str:
    """Markdown table of everything that has been run for the task."""
    rows = []
    for name in METHODS:
        runs = [figures for key, figures in results.cells.items() if key.startswith(f"run | {name} | ")]
        if not runs:
            continue
        losses = [figures["loss"] for figures in runs]
        seconds = Spread.of(results.cells["seconds"][name.removesuffix(EQUAL_TIME)])
        steps = runs[0]["steps"]
        rows.append(
            [
                name,
                f"{runs[0]['rate']:g}",
                str(steps),
                str(len(losses)),
                mean_and_deviation(losses),
                f"{seconds:.2f}",
                f"{seconds.median * steps:.0f}",
            ]
        )
    head = ["method", "learning rate", "steps", "seeds", "held-out loss", "s/step (range)", "s in all steps"]
    return markdown_table(head, rows)


def main() -> None:
    """Runs what is missing, then prints and writes the table."""
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
    args = parser.parse_args()
    settings = ("task", "steps", "rate_steps", "batch", "max_length", "eval_examples")
    key = {"model": "SmolLM2-135M-Instruct", "dtype": "fp32", **{name: getattr(args, name) for name in settings}}
    results = Results(EVIDENCE / f"quality-{args.task}.json", key)
    if not args.table_only:
        fill(results, args)
    results.publish(
        f"# Quality: {args.task}\n\nMean ± standard deviation over seeds; held-out loss before training: "
        f"{results.cells['before']:.4f}. {in_one_line(key)}.\n\n{table(results)}\n\n"
        f"{in_one_line(results.cells['environment'])}"
    )


def fill(results: Results, args: argparse.Namespace) -> None:
    """Runs what is missing: timing, learning rates, then seed by seed."""
    _, tokenizer = load_smollm2()
    splits = {split: TASKS[args.task](tokenizer, split, args.max_length) for split in ("train", "validation", "test")}
    collate = collator(tokenizer.pad_token_id)

    def train(steps: int, share: float, seed: int) -> list[dict]:
        return shuffled_batches(splits["train"], max(1, round(args.batch * share)), steps, seed, collate)

    def evaluator(split: str) -> Callable[[nn.Module], float]:
        batches = batches_of(splits[split][: args.eval_examples], 8, collate)
        return lambda model: held_out_loss(model, batches)

    cell(results, "environment", environment)
    cell(results, "seconds", lambda: time_steps(train, args.timing_repeats))
    cell(results, "before", lambda: evaluator("test")(build(METHODS["full"], 0)))
    if not args.seeds:
        return
    needed = dict.fromkeys(map(rated_as, args.methods))
    sweep = [(name, rate) for name in needed for rate in rates_of(name, args.task)]
    for name, rate in tqdm(sweep, desc="learning rates"):
        job = partial(run, METHODS[name], rate, 100, args.rate_steps, train, evaluator("validation"))
        cell(results, f"rate | {name} | {rate}", job)
    # seed by seed, so that an interrupted bench has whole seeds
    for seed, name in tqdm([(s, n) for s in args.seeds for n in args.methods], desc="runs"):
        steps, rate = args.steps, chosen_rate(results, name)
        if name.endswith(EQUAL_TIME):
            steps = steps_in_equal_time(results, name, steps)

        def job(name=name, rate=rate, seed=seed, steps=steps):
            loss = run(METHODS[name], rate, seed, steps, train, evaluator("test"))
            return {"loss": loss, "steps": steps, "rate": rate}

        cell(results, f"run | {name} | {seed}", job)


if __name__ == "__main__":
    main()
