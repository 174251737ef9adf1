"""
Layer-sparse tuning of SmolLM2-135M: bytes over a whole run, step time, cost of learning the importance, held-out loss.

    python scripts/bench_ist.py --bars              # runs of one seed with their bytes, times, then losses of 3 seeds
    python scripts/bench_ist.py --bars --seeds      # bytes and times only

Bytes: fp32, long prompts of exactly --max-length tokens, so that steps compare; what is saved for backward, gradients
and optimizer state are counted in every step of a run with its draws. Times: forward, backward and optimizer, the rows
take turns; run nothing beside that part. Losses: the docstring task, AdamW, the learning rates that bench_quality
chose for LoRA and for full training. Interrupted, it goes on with the first cell that is not finished.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from bench_common import (
    EVIDENCE,
    MIB,
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
    quotient,
)
from bench_tasks import docstrings, long_prompts
from bench_training import batches_of, held_out_loss, shuffled_batches, warmup_then_decay
from bench_velora import RATES, Row, build, prepared
from torch import nn
from tqdm.auto import tqdm

from hf_tokenseek import IstConfig
from hf_tokenseek.ist.suppression import Prober
from hf_tokenseek.memory import SavedActivations

# a run of 24 steps sees six draws, and learns five times
SPARSE = {"layers": 0.25, "period": 4, "score_steps": 4}
LISA = {"policy": "lisa", "layers": 0.07, "period": 4}
SPARSELY, TENTH = {"ist": SPARSE}, {"ratio": 0.1}
LORA, IST, RANDOM, SUFFIX = "LoRA", "LoRA, IST", "LoRA, random layers", "LoRA, the topmost quarter"
SEEK, FULL, LISA_ROW, FROZEN = "LoRA, IST + seek 0.1", "full", "LISA", "LISA, embeddings frozen"
ROWS = {
    row.name: row
    for row in (
        Row(LORA, lora=True),
        Row("LoRA + checkpointing", lora=True, checkpointing=True),
        Row(IST, SPARSELY, lora=True),
        Row(RANDOM, {"ist": {**SPARSE, "policy": "random"}}, lora=True),
        Row(SUFFIX, {"ist": {**SPARSE, "policy": "random", "lowest": 0.75}}, lora=True),
        Row(SEEK, {**SPARSELY, "seek": TENTH}, lora=True, trained_with={**SPARSELY, "seek": {}}),
        Row(FULL),
        Row(LISA_ROW, {"ist": LISA}),
        Row(FROZEN, {"ist": {**LISA, "embeddings": False}}),
    )
}

TRAINED = (LORA, IST, RANDOM, SEEK, FULL, LISA_ROW, FROZEN)


def run(row: Row, load: Callable, seed: int, batches: Sequence[dict], watch: Callable | None = None) -> nn.Module:
    """Trains on `batches`; `watch(model, batch, optimizer, handle)` makes a step in place of [`train_step`]."""
    model = build(row, load, seed)
    methods = row.methods if watch is not None or row.trained_with is None else row.trained_with
    with prepared(model, row, methods) as handle:
        rate = RATES[row.lora]
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
        if handle is not None:
            handle.ist.manage(optimizer)
        schedule = warmup_then_decay(optimizer, len(batches))
        for index, batch in enumerate(tqdm(batches, desc=row.name, leave=False, mininterval=5)):
            for method in () if handle is None else filter(None, (handle.seek, handle.ist)):
                method.begin_step(index)
            (watch or train_step)(model, batch, optimizer, handle)
            schedule.step()
    return model


def train_step(model: nn.Module, batch: dict, optimizer, handle) -> None:
    """Forward, backward, clip at 1, AdamW; gradients go afterwards."""
    model(**batch).loss.backward()
    nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
    optimizer.step()
    optimizer.zero_grad()


def bytes_over_a_run(row: Row, load: Callable, batches: Sequence[dict]) -> list[dict]:
    """What a run holds, step by step: MiB saved for backward, of gradients, of optimizer state; the lowest layer."""
    curve = []

    def watch(model: nn.Module, batch: dict, optimizer, handle) -> None:
        with SavedActivations(model) as saved:
            loss = model(**batch).loss
        saved_mib = saved.mib
        loss.backward()
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
        state = sum(t.nbytes for entry in optimizer.state.values() for t in entry.values())
        lowest = handle.ist.active[0] if handle is not None else 0
        curve.append({"saved": saved_mib, "gradients": gradients / MIB, "state": state / MIB, "lowest": lowest})

    run(row, load, 0, batches, watch)
    return curve


def step_seconds(load: Callable, batch: dict, repeats: int) -> dict[str, Any]:
    """Wall time of steps, a row after the other in every round, and of one probe of the default's sets of layers."""
    rounds: dict[str, list[float]] = {name: [] for name in ROWS}
    models = {lora: build(Row("", lora=lora), load) for lora in (True, False)}
    probes = []
    for round_ in tqdm(range(repeats + 1), desc="rounds"):
        for name, row in tqdm(ROWS.items(), leave=False):
            model = models[row.lora]
            with prepared(model, row, row.methods) as handle:
                optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
                if handle is not None:
                    handle.ist.manage(optimizer)
                    # another draw each round, never a step that is due to learn
                    handle.ist.begin_step(SPARSE["period"] * round_ + 1)
                began = now()
                train_step(model, batch, optimizer, handle)
                if round_:
                    rounds[name].append(now() - began)
                if name == IST:
                    sets, layers = handle.ist.policy.sets(1), handle.ist.layers
                    began, prober = now(), Prober(handle.ist.model)
                    for drawn in sets:
                        prober.loss(batch, [layers[k] for k in drawn], handle.ist.config.beta)
                    probes.append(now() - began)
    return {"steps": rounds, "probes": probes[1:]}


def peak(curve: Sequence[dict]) -> float:
    """The most that a run holds at once: everything saved with gradients and state beside it."""
    return max(step["saved"] + step["gradients"] + step["state"] for step in curve)


def guaranteed(config, tokens: int, rank: int = 16, itemsize: int = 4) -> float:
    """
    MiB that a run with a quarter of the layers holds less than LoRA whichever layers are drawn: of each idle layer the
    inputs of its adapters (attention, MLP, down; attention keeps that of `o_proj` anyway) and what their B read; their
    gradients and two moments.
    """
    layers = config.num_hidden_layers
    idle = layers - max(1, round(SPARSE["layers"] * layers))
    hidden, inner = config.hidden_size, config.intermediate_size
    keys = config.num_key_value_heads * (hidden // config.num_attention_heads)
    inputs = tokens * (2 * hidden + inner + 7 * rank)
    widths = 2 * (hidden + hidden) + 2 * (hidden + keys) + 3 * (hidden + inner)
    return idle * itemsize * (inputs + 3 * rank * widths) / MIB


def bars(results: Results, config, tokens: int) -> list[Bar]:
    """The project's bars."""
    curves = {name: results.cells[f"bytes | {name}"] for name in ROWS}
    seconds = results.cells["seconds"]
    saved = peak(curves[LORA]) - peak(curves[IST])
    step = Spread.of(seconds["steps"][IST]).median
    share = Spread.of(seconds["probes"]).median / (IstConfig().score_steps * step)
    cycle = curves[IST][: SPARSE["period"]]
    grown = max(s["state"] + s["gradients"] for s in curves[IST]) / max(s["state"] + s["gradients"] for s in cycle)
    return [
        Bar("peak of the run: guaranteed saving / saving", guaranteed(config, tokens) / saved, 1.0),
        Bar(f"learning: one probe / {IstConfig().score_steps} steps", share, 0.05),
        Bar("gradients and state: largest of the run / of the first period", grown, 1.0 + 1e-9),
    ]


def table(results: Results) -> str:
    """Markdown table of everything that has been measured."""
    lines, seconds = [], results.cells["seconds"]["steps"]
    for name, row in ROWS.items():
        curve, base = results.cells[f"bytes | {name}"], LORA if row.lora else FULL
        losses = [loss for key, loss in results.cells.items() if key.startswith(f"loss | {name} | ")]
        lines.append(
            (
                name,
                *(_range(step[part] for step in curve) for part in ("saved", "gradients", "state")),
                f"{peak(curve):.0f}",
                f"{Spread.of(seconds[name]):.2f}",
                f"{quotient(seconds[name], seconds[base]):.2f}",
                f"{mean_and_deviation(losses)} ({len(losses)})" if losses else "",
            )
        )
    head = (
        "row",
        "saved [MiB]",
        "gradients [MiB]",
        "state [MiB]",
        "peak of the run",
        "step [s]",
        "x all layers",
    )
    return markdown_table((*head, "loss (seeds)"), lines)


def curves(results: Results) -> str:
    """What some rows hold in all, step by step."""
    rows = (LORA, IST, RANDOM, SUFFIX, FULL, LISA_ROW)
    lines = []
    for name in rows:
        totals = [s["saved"] + s["gradients"] + s["state"] for s in results.cells[f"bytes | {name}"]]
        lines.append((name, *(f"{total:.0f}" for total in totals[:: SPARSE["period"]])))
    steps = len(results.cells[f"bytes | {LORA}"])
    return markdown_table(("MiB in step", *map(str, range(0, steps, SPARSE["period"]))), lines)


def _range(values) -> str:
    values = list(values)
    return f"{min(values):.0f}" if max(values) - min(values) < 0.5 else f"{min(values):.0f}..{max(values):.0f}"


def train(row: Row, load: Callable, seed: int, batches: Sequence[dict], held_out: Sequence[dict]) -> float:
    """Held-out loss after training on `batches`."""
    return held_out_loss(run(row, load, seed, batches), held_out)


def main(argv: Sequence[str] | None = None, load: Callable = load_smollm2) -> int:
    """Measures what is missing, prints and writes the tables; `load` gives the model and its tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--eval-examples", type=int, default=24)
    add_common_options(parser)
    args = parser.parse_args(argv)
    names = ("repeats", "steps", "batch", "max_length", "eval_examples")
    key = {"model": "SmolLM2-135M-Instruct", "dtype": "fp32", **{name: getattr(args, name) for name in names}}
    results = Results(args.output or EVIDENCE / "bench_ist.json", key, args.fresh)
    model, tokenizer = load()
    collate = collator(tokenizer.pad_token_id)
    whole = batches_of(
        long_prompts(tokenizer, "train", args.max_length)[: args.steps * args.batch], args.batch, collate
    )
    cell(results, "seconds", lambda: step_seconds(load, whole[0], args.repeats))
    for name, row in tqdm(ROWS.items(), desc="bytes"):
        cell(results, f"bytes | {name}", partial(bytes_over_a_run, row, load, whole))
    if args.seeds:
        data = {split: docstrings(tokenizer, split, args.max_length) for split in ("train", "test")}
        held_out = batches_of(data["test"][: args.eval_examples], 8, collate)
        jobs = [(seed, ROWS[name]) for seed in args.seeds for name in TRAINED]
        for seed, row in tqdm(jobs, desc="runs"):
            batches = shuffled_batches(data["train"], args.batch, args.steps, seed, collate)
            cell(results, f"loss | {row.name} | {seed}", partial(train, row, load, seed, batches, held_out))
    found = bars(results, model.config, args.batch * args.max_length) if args.bars else []
    results.publish(
        f"# Sparse tuning of SmolLM2-135M\n\n{in_one_line(key)}; IST and random {SPARSE}, LISA {LISA}. Bytes: lowest "
        f"to highest step of a run.\n\n{table(results)}\n\n## Over the run\n\nSaved, gradients and optimizer state "
        f"together.\n\n{curves(results)}\n\n```\n{judge(found)}\n```\n\n{results.origins()}"
    )
    return exit_status(found, args.strict)


if __name__ == "__main__":
    sys.exit(main())
