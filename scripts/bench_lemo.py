"""
LeMo: what a training step of SmolLM2-135M with LoRA takes, and how long a sequence fits beside larger models.

    python scripts/bench_lemo.py --bars                     # everything, to docs/evidence/bench_lemo.*
    python scripts/bench_lemo.py --tokens 2048 --fake 8192  # less of it

What stands in docs/evidence was made by

    python scripts/bench_lemo.py --bars --tokens 2048 8192 --repeats 2 \\
        --rows dense checkpointing "keep 0.4" "keep 0.4 + seek 0.1" "keep 0.4 + checkpointing"

Times are wall clock of forward and backward, the rows take turns; run nothing beside that part. Larger models (bf16,
LoRA) run under fake tensors, so that nothing is allocated. Every row computes its loss in chunks of labelled rows.
LeMo's differ from the others by what layers do and by what the head does: labels of dropped tokens do not count
(`loss="kept"`), so that the head sees fewer rows. Interrupted, it goes on with the first cell that is not finished.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from bench_common import (
    DEVICE,
    EVIDENCE,
    GIB,
    Bar,
    Results,
    Spread,
    add_common_options,
    cell,
    exit_status,
    judge,
    load_smollm2,
    markdown_table,
    now,
    quotient,
)
from bench_flops import counted_flops, head_flops, head_rows
from bench_memory import LLAMA_1B
from bench_memory import build as build_fake
from bench_step import real_text
from bench_velora import LORA, Row, build, prepared
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedConfig

from hf_tokenseek.memory import LiveMemory, SavedActivations
from hf_tokenseek.memory.fake import fake_model, fake_tensors
from hf_tokenseek.patched_forward import replaced_forward
from hf_tokenseek.patching import find_causal_lm
from hf_tokenseek.seek.batch import IGNORE, known_counts
from tokenseek_kernels import linear_cross_entropy
from tokenseek_kernels.dispatch import as_on_a_gpu

LLAMA_8B = {
    **LLAMA_1B,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "head_dim": 128,
    "tie_word_embeddings": False,
}
MODELS = {"Llama-3.2-1B": LLAMA_1B, "Llama-3-8B": LLAMA_8B}
KEEP = {"lemo": {"keep": 0.4}}
DENSE, CHECKPOINTING, LEMO, DETACH = "dense", "checkpointing", "keep 0.4", "keep 0.4, detach"
LEMO_CHECKPOINTING, LEMO_SEEK, LEMO_LEAN = "keep 0.4 + checkpointing", "keep 0.4 + seek 0.1", "keep 0.4 + lean"
LEAN, TILES = {"lean": True}, {"lean": True, "mlp_tiles": 8}
LEAN_CHECKPOINTING, TILED = "checkpointing + lean", "checkpointing + lean, 8 tiles"
ROWS = {
    row.name: row
    for row in (
        Row(DENSE, lora=True),
        Row(CHECKPOINTING, lora=True, checkpointing=True),
        Row(LEAN_CHECKPOINTING, LEAN, lora=True, checkpointing=True),
        Row(TILED, TILES, lora=True, checkpointing=True),
        Row(LEMO, KEEP, lora=True),
        Row(DETACH, {"lemo": {"keep": 0.4, "mode": "detach"}}, lora=True),
        Row(LEMO_LEAN, {**KEEP, **LEAN}, lora=True),
        Row(LEMO_SEEK, {**KEEP, "seek": {"ratio": 0.1}}, lora=True),
        Row(LEMO_CHECKPOINTING, KEEP, lora=True, checkpointing=True),
        Row(f"{LEMO} + {TILED}", {**KEEP, **TILES}, lora=True, checkpointing=True),
    )
}
MEMORIES = (24, 80)
NOTES = """LoRA of rank 16 on all linear layers, one sequence, labels everywhere, the loss in chunks of labelled rows.
Keep 0.4: blocks of 64 tokens, all layers but the first two. Saved: what autograd holds at the end of forward. Peak: of
forward and backward above the weights. FLOPs: torch's counter, forward and backward (it counts attention as if it were
not causal). With keep 0.4 labels of dropped tokens do not count: besides the layers, the head is computed for fewer
rows, in FLOPs and in steps ("detach" has all). What the head takes of them stands below each table, by formula: three
products of rows, hidden size and vocabulary (logits, logits again, gradient of the hidden states)."""


@contextmanager
def chunked_loss(model: nn.Module, dynamic: bool = True) -> Iterator[None]:
    """The model's own forward, head and loss in chunks; `dynamic` leaves out rows without a label, as trl does."""
    model = find_causal_lm(model)
    head = model.get_output_embeddings()

    def loss_function(logits: Tensor, labels: Tensor, **_) -> Tensor:
        hidden, targets = logits.flatten(0, 1), F.pad(labels, (0, 1), value=IGNORE)[:, 1:].flatten()
        if dynamic:
            hidden, targets = hidden[targets != IGNORE], targets[targets != IGNORE]
        return linear_cross_entropy(hidden, head.weight, targets).sum() / (targets != IGNORE).sum()

    before = model.loss_function
    model.loss_function = loss_function
    try:
        with replaced_forward(head, lambda hidden: hidden):
            yield
    finally:
        model.loss_function = before


@contextmanager
def ready(model: nn.Module, row: Row, dynamic: bool = True) -> Iterator:
    """The model as the row trains it, for the time of the block."""
    with ExitStack() as stack:
        # TokenSeek has a chunked loss of its own
        if "seek" not in row.methods:
            stack.enter_context(chunked_loss(model, dynamic))
        yield stack.enter_context(prepared(model, row, row.methods))


def count(model: nn.Module, row: Row, ids: Tensor, fake: bool = False) -> dict[str, float]:
    """GiB saved and at the peak of one step; of fake tensors without what kernels take inside."""
    model.zero_grad(set_to_none=True)
    with ready(model, row, not fake), ExitStack() as stack:
        if fake:
            stack.enter_context(as_on_a_gpu())
        live = stack.enter_context(LiveMemory(model, ids, inside=not fake))
        with SavedActivations(model) as saved:
            loss = model(input_ids=ids, labels=ids).loss
        saved_bytes = saved.bytes
        loss.backward()
    peak_bytes = live.peak_bytes - live.base_bytes
    return {"saved_gib": saved_bytes / GIB, "peak_gib": peak_bytes / GIB}


def count_flops(model: nn.Module, row: Row, ids: Tensor) -> int:
    """FLOPs of one forward and backward; by itself, because the counter keeps alive what checkpoints compute again."""
    with ready(model, row), counted_flops() as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    return counter.get_total_flops()


def step_seconds(model: nn.Module, row: Row, ids: Tensor) -> float:
    """Wall time of one forward and backward."""
    model.zero_grad(set_to_none=True)
    with ready(model, row):
        began = now()
        model(input_ids=ids, labels=ids).loss.backward()
        return now() - began


def measure(load: Callable, ids: Tensor, rows: Sequence[str], repeats: int) -> dict[str, dict]:
    """Everything about steps of one length; counting warms up."""
    model = build(Row("", lora=True), load).to(DEVICE)
    found = {}
    for name in tqdm(rows, desc=f"{ids.shape[1]} tokens: bytes", leave=False):
        flops = count_flops(model, ROWS[name], ids)
        found[name] = {**count(model, ROWS[name], ids), "flops": flops, "seconds": []}
    for _ in tqdm(range(repeats), desc=f"{ids.shape[1]} tokens: rounds", leave=False):
        for name in rows:
            found[name]["seconds"].append(step_seconds(model, ROWS[name], ids))
    return found


def head_note(config: PreTrainedConfig, n: int) -> str:
    """What the head takes of the FLOPs."""
    dense, kept = (head_flops(config, head_rows(n, keep)) / 1e12 for keep in (1.0, KEEP["lemo"]["keep"]))
    return f"Of it the head: {dense:.2f} TFLOP of all rows, {kept:.2f} of those that keep 0.4 keeps."


def fake_lora(sizes: dict) -> nn.Module:
    """A Llama of these sizes in bf16 with adapters."""
    import peft

    model = build_fake(sizes)
    # adapters of a 16-bit model stay in 16 bits, as trl makes them
    return peft.get_peft_model(model, peft.LoraConfig(**LORA), autocast_adapter_dtype=False).train()


def measure_fake(sizes: dict, n: int) -> dict[str, dict]:
    """GiB of every row at `n` tokens; gradients, optimizer state and weights of LoRA are told apart."""
    with fake_tensors() as mode:
        model = fake_model(partial(fake_lora, sizes), mode)
        ids = torch.randint(sizes["vocab_size"], (1, n))
        weights = sum(p.nbytes for p in model.parameters()) / GIB
        # gradients, and AdamW's moments in float32
        trained = sum(p.numel() * (p.element_size() + 8) for p in model.parameters() if p.requires_grad) / GIB
        with known_counts([n], [n - 1]):
            found = {name: count(model, row, ids, fake=True) for name, row in tqdm(ROWS.items(), leave=False)}
    return {name: {**row, "constant_gib": weights + trained} for name, row in found.items()}


def longest(cells: dict[int, dict], name: str, memory: int) -> int:
    """Tokens that fit: the straight line through the two longest lengths measured, which peaks follow there."""
    (n1, first), (n2, second) = sorted(cells.items())[-2:]
    slope = (second[name]["peak_gib"] - first[name]["peak_gib"]) / (n2 - n1)
    room = memory - second[name]["constant_gib"] - second[name]["peak_gib"]
    return int(n2 + room / slope) if room > -second[name]["peak_gib"] else 0


def table(found: dict[str, dict]) -> str:
    """The table of steps of one length."""
    dense, checkpointed = found[DENSE], found[CHECKPOINTING]
    head = ("row", "saved [GiB]", "x dense", "peak [GiB]", "TFLOP", "x dense", "step [s]", "x dense")
    return markdown_table(
        (*head, "x checkpointing"),
        (
            (
                name,
                f"{row['saved_gib']:.3f}",
                f"{row['saved_gib'] / dense['saved_gib']:.3f}",
                "-" if (peak := row.get("peak_gib")) is None else f"{peak:.3f}",
                f"{row['flops'] / 1e12:.2f}",
                f"{row['flops'] / dense['flops']:.3f}",
                f"{Spread.of(row['seconds']):.3g}",
                f"{quotient(row['seconds'], dense['seconds']):.2f}",
                f"{quotient(row['seconds'], checkpointed['seconds']):.2f}",
            )
            for name, row in found.items()
        ),
    )


def fake_table(cells: dict[int, dict]) -> str:
    """Saved and peak by length, and the longest sequences that fit."""
    head = ["row", *(f"{n} saved / peak [GiB]" for n in sorted(cells)), *(f"fits {m} GiB" for m in MEMORIES)]
    lines = []
    for name in ROWS:
        at = [f"{cells[n][name]['saved_gib']:.2f} / {cells[n][name]['peak_gib']:.2f}" for n in sorted(cells)]
        lines.append([name, *at, *(f"{longest(cells, name, memory):,}" for memory in MEMORIES)])
    return markdown_table(head, lines)


def bars(results: Results, tokens: Sequence[int]) -> list[Bar]:
    """The project's bars, at 8,192 tokens, where they were measured."""
    if 8192 not in tokens:
        return []
    found = results.cells["step | 8192"]
    return [
        Bar("8192 tokens, keep 0.4: saved / dense", found[LEMO]["saved_gib"] / found[DENSE]["saved_gib"], 0.52),
        Bar("step / dense", quotient(found[LEMO]["seconds"], found[DENSE]["seconds"]).median, 0.74),
    ]


def main(argv: Sequence[str] | None = None, load: Callable = load_smollm2) -> int:
    """Measures what is missing, prints and writes the tables; `load` gives the model and its tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[2048, 4096, 8192])
    parser.add_argument("--fake", type=int, nargs="*", default=[8192, 32768, 131072])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--repeats", type=int, default=3)
    add_common_options(parser)
    args = parser.parse_args(argv)
    key: dict[str, Any] = {"repeats": args.repeats, "rows": args.rows}
    results = Results(args.output or EVIDENCE / "bench_lemo.json", key, args.fresh)
    model, tokenizer = load() if args.tokens else (None, None)
    for n in args.tokens:
        ids = real_text(tokenizer, 1, n).to(DEVICE) if f"step | {n}" not in results else None
        cell(results, f"step | {n}", partial(measure, load, ids, args.rows, args.repeats))
    jobs = [(name, n) for name in MODELS for n in args.fake]
    for name, n in tqdm(jobs, desc="fake tensors"):
        cell(results, f"fake | {name} | {n}", partial(measure_fake, MODELS[name], n))
    found = bars(results, args.tokens) if args.bars else []
    sections = [f"# LeMo: one training step\n\n{NOTES}", "## SmolLM2-135M, fp32, measured"]
    sections += [
        f"### {n} tokens\n\n{table(results.cells[f'step | {n}'])}\n\n{head_note(model.config, n)}" for n in args.tokens
    ]
    for name in MODELS if len(args.fake) > 1 else ():
        cells = {n: results.cells[f"fake | {name} | {n}"] for n in args.fake}
        sections.append(f"## {name}, bf16, simulated with fake tensors\n\n{fake_table(cells)}")
    sections += [f"## Bars\n\n```\n{judge(found)}\n```"] if args.bars else []
    results.publish("\n\n".join([*sections, results.origins()]))
    return exit_status(found, args.strict)


if __name__ == "__main__":
    sys.exit(main())
