"""
Memory of one training step (forward and backward) of Llama-3.2-1B in bf16, by fake tensors: nothing is allocated.

    python scripts/bench_memory.py --bars               # 1 x 2048 and 1 x 16384 tokens; docs/evidence/bench_memory.*
    python scripts/bench_memory.py --seq 4096 --batch 2 --output outputs/memory.json
    python scripts/bench_memory.py --check              # on a tiny Llama, every row: fake bytes equal real bytes
"""

import argparse
import gc
import sys
from collections.abc import Sequence
from contextlib import nullcontext

import bench_rows as ways
import torch
from bench_common import (
    EVIDENCE,
    GIB,
    MIB,
    Bar,
    Results,
    add_common_options,
    environment,
    exit_status,
    in_one_line,
    judge,
    markdown_table,
)
from torch import Tensor, nn

from hf_tokenseek import SeekConfig
from hf_tokenseek.memory import LiveMemory, SavedActivations
from hf_tokenseek.memory.fake import fake_tensors
from tokenseek_kernels.scores import WORKSPACE_MIB

LLAMA_1B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
TINY = {
    **LLAMA_1B,
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
HEADER = (
    "row",
    "k/n",
    "saved [GiB]",
    "x plain",
    "limit [GiB]",
    "alive [GiB]",
    "peak [GiB]",
    "x plain",
    "inside [MiB]",
)
NOTES = """Saved: what autograd holds at the end of forward. Limit of a seek row: k/n of what its like with chunked
loss and all rows saves, plus the scouted keys and values of all tokens. Alive: everything forward has left behind,
whoever holds it. Peak: of forward and backward above the parameters, temporaries inside TokenSeek's operators and
the gradients themselves ({gradients:.3f} GiB, which no way saves) included; sizes rounded up to 512 bytes as the
CUDA allocator does. Inside: the most that one TokenSeek operator took for temporaries: a block of {workspace} MiB,
its low-precision original, and float32 copies of what it reads. Not modelled: fragmentation, what torch's own
kernels take inside one call, the optimizer."""
BARS_AT = "1 x 2048"


def build(sizes: dict) -> nn.Module:
    """A Llama in bf16 with random weights, training."""
    from transformers import LlamaConfig, LlamaForCausalLM

    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(LlamaConfig(**sizes, use_cache=False, max_position_embeddings=131072)).train()
    finally:
        torch.set_default_dtype(default)


def measure(model: nn.Module, row: ways.Row, ids: Tensor) -> dict[str, int]:
    """Bytes of one forward and backward, the row's way."""
    labels = ways.label(ids, row.labelled)
    model.zero_grad(set_to_none=True)
    gc.collect()
    with ways.prepared(model, row), LiveMemory(model, ids, labels) as live:
        with SavedActivations(model) as saved:
            total = ways.forward_loss(model, row, ids, labels, planned=True)
        figures = {"saved_bytes": saved.bytes, "alive_bytes": live.bytes - live.base_bytes}
        total.backward()
    return {
        **figures,
        "peak_bytes": live.peak_bytes - live.base_bytes,
        "inside_bytes": live.inside_bytes,
        "gradient_bytes": sum(p.grad.nbytes for p in model.parameters() if p.grad is not None),
    }


def measure_rows(sizes: dict, batch: int, n: int, score: str, fake: bool = True) -> dict[str, dict]:
    """`{row name: figures}`; seek rows also have their share of rows and the limit of what can be saved."""
    baselines = (ways.PLAIN, ways.CHUNKED, ways.CHECKPOINTING, ways.CHECKPOINTING_CHUNKED)
    rows = (*baselines, ways.LEAN_CHUNKED, *ways.seek_rows(score))
    with fake_tensors() if fake else nullcontext():
        model, ids = build(sizes), torch.randint(sizes["vocab_size"], (batch, n))
        found = {row.name: measure(model, row, ids) for row in rows}
    per_token = (
        sizes["num_hidden_layers"] * sizes["num_key_value_heads"] * sizes["head_dim"] * 2 * 2
    )  # K and V in bf16
    for row in rows:
        if row.seek is not None:
            share = ways.planned_sizes(row, ids).rows / n
            like = ways.LEAN_CHUNKED if row.lean else ways.CHUNKED
            like = ways.CHECKPOINTING_CHUNKED if row.checkpointing else like
            # without checkpointing K and V are among what all rows save, and the selected ones lie in the scouted ones
            own = 1.0 if row.checkpointing else 1 - share
            limit = share * found[like.name]["saved_bytes"] + own * per_token * batch * n
            found[row.name] |= {"share": share, "limit_bytes": round(limit)}
    return found


def table(found: dict[str, dict]) -> str:
    """The table of one cell."""
    plain = found[ways.PLAIN.name]

    def cells(name: str, row: dict) -> tuple[str, ...]:
        seek = "limit_bytes" in row
        return (
            name,
            f"{row['share']:.3f}" if seek else "",
            f"{row['saved_bytes'] / GIB:.4f}",
            f"{row['saved_bytes'] / plain['saved_bytes']:.4f}",
            f"{row['limit_bytes'] / GIB:.4f}" if seek else "",
            f"{row['alive_bytes'] / GIB:.4f}",
            f"{row['peak_bytes'] / GIB:.3f}",
            f"{row['peak_bytes'] / plain['peak_bytes']:.3f}",
            f"{row['inside_bytes'] / MIB:.1f}",
        )

    return markdown_table(HEADER, (cells(name, row) for name, row in found.items()))


def bars(cells: dict[str, dict]) -> list[Bar]:
    """The project's bars where their cell was measured, and that nothing is kept which autograd does not see."""
    found = []
    if BARS_AT in cells:
        saved = {name: row["saved_bytes"] for name, row in cells[BARS_AT].items()}
        found = [
            Bar(f"{ways.SEEK_10}, {BARS_AT}: saved / plain", saved[ways.SEEK_10] / saved[ways.PLAIN.name], 0.10),
            Bar(f"{ways.SEEK_10_CHECKPOINTING}, {BARS_AT}: saved GiB", saved[ways.SEEK_10_CHECKPOINTING] / GIB, 0.09),
            Bar(
                f"{ways.LEAN_CHUNKED.name}, {BARS_AT}: saved / {ways.CHUNKED.name}",
                saved[ways.LEAN_CHUNKED.name] / saved[ways.CHUNKED.name],
                0.62,
            ),
            Bar(
                f"{ways.SEEK_10_LEAN}, {BARS_AT}: saved / plain",
                saved[ways.SEEK_10_LEAN] / saved[ways.PLAIN.name],
                0.07,
            ),
        ]
    for name, rows in cells.items():
        unseen = max(1 - row["saved_bytes"] / row["alive_bytes"] for row in rows.values())
        found.append(Bar(f"all rows, {name}: share of what is alive that autograd does not see", unseen, 0.01))
    return found


def check(score: str) -> int:
    """Compares fake with real bytes on a tiny model; returns the number of rows that differ."""
    fake, real = (measure_rows(TINY, 2, 96, score, fake) for fake in (True, False))
    for name in real:
        same = fake[name] == real[name]
        print(f"{name}: {'fake equals real' if same else f'fake {fake[name]} differs from real'} {real[name]}")
    return sum(fake[name] != real[name] for name in real)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq", type=int, nargs="+", default=[2048, 16384], help="tokens of a sequence")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--score", default=SeekConfig.score, help="what selects in the rows with a ratio")
    parser.add_argument("--check", action="store_true", help="only compare fake with real bytes on a tiny Llama")
    add_common_options(parser)
    options = parser.parse_args(argv)
    if options.check:
        return min(1, check(options.score))
    key = {**environment(), "score": options.score}
    results = Results(options.output or EVIDENCE / "bench_memory.json", key, options.fresh)
    names = {f"{options.batch} x {n}": n for n in options.seq}
    for name, n in names.items():
        if name not in results:
            results[name] = measure_rows(LLAMA_1B, options.batch, n, options.score)
    found = bars(results.cells) if options.bars else []
    gradients = max(row["gradient_bytes"] for rows in results.cells.values() for row in rows.values()) / GIB
    notes = NOTES.format(gradients=gradients, workspace=WORKSPACE_MIB)
    sections = [f"# Memory of one training step of Llama-3.2-1B in bf16\n\n{in_one_line(key)}\n\n{notes}"]
    sections += [f"## {name} tokens\n\n{table(results.cells[name])}" for name in names]
    sections += [f"## Bars\n\n```\n{judge(found)}\n```"] if options.bars else []
    results.publish("\n\n".join(sections))
    return exit_status(found, options.strict)


if __name__ == "__main__":
    sys.exit(main())
