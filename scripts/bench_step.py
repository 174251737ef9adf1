"""
Time and saved activations of one training step (forward and backward, no optimizer) of SmolLM2-135M on real text.

    python scripts/bench_step.py --bars                     # 512, 1024, 2048 tokens; fp32 and bf16
    python scripts/bench_step.py --tokens 1024 --dtypes fp32 --repeats 9
    python scripts/bench_step.py --quick                    # 256 tokens, fp32, 2 repeats; written to outputs/

The rows take turns, so that a drift of the machine hits all alike; each row's first step is thrown away (its saved
activations are counted). Interrupted, it goes on with the first cell that is not finished. Run nothing beside it.
"""

import argparse
import sys
from collections.abc import Callable, Sequence

import torch
from bench_common import (
    DEVICE,
    EVIDENCE,
    MIB,
    ROOT,
    Bar,
    Results,
    Spread,
    add_common_options,
    environment,
    exit_status,
    in_one_line,
    judge,
    load_smollm2,
    markdown_table,
    now,
    quotient,
)
from bench_rows import BASELINES, CHECKPOINTING, LEAN, PLAIN, SEEK_10, Row, forward_loss, label, prepared, seek_rows
from torch import Tensor, nn
from tqdm import tqdm

from hf_tokenseek import SeekConfig
from hf_tokenseek.memory import SavedActivations

NOTES = """Seconds: median (lowest..highest) of the repeats. Ratio: quotient of the medians (range of the quotients
within a round). Saved: at the end of forward. bf16 is autocast over fp32 weights. Labels are everywhere unless a
row says otherwise; the cost of plain training and of checkpointing does not depend on them, so those rows stand
for 5 % too. Peak: on a GPU, of forward and backward above the parameters."""
HEADER = ("row", "step [s]", "x plain", "x checkpointing", "saved [MiB]", "saved x plain", "peak [MiB]")
BARS_AT = "fp32, 1 x 1024"


def real_text(tokenizer, batch: int, tokens: int) -> Tensor:
    """`(batch, tokens)` token ids: functions of the standard library, each with its docstring, one after the other."""
    from recipes.python_docstrings import python_docstrings

    ids = []
    for record in python_docstrings("train"):
        ids += tokenizer(f"{record['prompt']}\n\n{record['completion']}\n\n", add_special_tokens=False)["input_ids"]
        if len(ids) >= batch * tokens:
            return torch.tensor(ids[: batch * tokens]).view(batch, tokens)
    raise ValueError(f"The docstring task has {len(ids)} tokens, {batch * tokens} are asked for. Lower --batch.")


def forward(model: nn.Module, row: Row, ids: Tensor, dtype: str) -> Tensor:
    """The loss of one micro-batch, under autocast for bf16."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=dtype == "bf16"):
        return forward_loss(model, row, ids, label(ids, row.labelled))


def count_saved_mib(model: nn.Module, row: Row, ids: Tensor, dtype: str) -> float:
    """What autograd holds at the end of forward; goes through backward as well, to warm everything up."""
    model.zero_grad(set_to_none=True)
    with prepared(model, row):
        with SavedActivations(model) as saved:
            loss = forward(model, row, ids, dtype)
        saved_mib = saved.mib
        loss.backward()
    return saved_mib


def step_seconds(model: nn.Module, row: Row, ids: Tensor, dtype: str) -> float:
    """Wall time of one forward and backward."""
    model.zero_grad(set_to_none=True)
    with prepared(model, row):
        start = now()
        forward(model, row, ids, dtype).backward()
        return now() - start


def peak_mib(model: nn.Module, row: Row, ids: Tensor, dtype: str) -> float | None:
    """What a GPU has allocated at the most, gradients included, above what it holds before a step; `None` on a CPU."""
    if DEVICE == "cpu":
        return None
    model.zero_grad(set_to_none=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step_seconds(model, row, ids, dtype)
    return (torch.cuda.max_memory_allocated() - before) / MIB


def measure(model: nn.Module, rows: Sequence[Row], ids: Tensor, dtype: str, repeats: int, advance: Callable) -> dict:
    """`{row name: {"saved_mib": float, "peak_mib": ..., "seconds": [one a round]}}`; `advance`: after every step."""
    figures = {}
    for row in rows:
        saved_mib = count_saved_mib(model, row, ids, dtype)
        figures[row.name] = {"saved_mib": saved_mib, "peak_mib": peak_mib(model, row, ids, dtype), "seconds": []}
        advance()
    for _ in range(repeats):
        for row in rows:
            figures[row.name]["seconds"].append(step_seconds(model, row, ids, dtype))
            advance()
    return figures


def ratio_of(figures: dict, row: str, base: str) -> Spread:
    """How the times of two rows of a cell compare."""
    return quotient(figures[row]["seconds"], figures[base]["seconds"])


def table(figures: dict) -> str:
    """The table of one cell."""
    plain_mib = figures[PLAIN.name]["saved_mib"]
    return markdown_table(
        HEADER,
        (
            (
                name,
                f"{Spread.of(found['seconds']):.3g}",
                f"{ratio_of(figures, name, PLAIN.name):.2f}",
                f"{ratio_of(figures, name, CHECKPOINTING.name):.2f}",
                f"{found['saved_mib']:.1f}",
                f"{found['saved_mib'] / plain_mib:.3f}",
                "-" if (peak := found.get("peak_mib")) is None else f"{peak:.1f}",
            )
            for name, found in figures.items()
        ),
    )


def bars(cells: dict[str, dict]) -> list[Bar]:
    """The project's bars, where the cell they are set for was measured."""
    if BARS_AT not in cells:
        return []
    figures, where = cells[BARS_AT], f"{SEEK_10}, {BARS_AT}:"
    saved_mib, plain_mib = figures[SEEK_10]["saved_mib"], figures[PLAIN.name]["saved_mib"]
    return [
        Bar(f"{where} step / plain", ratio_of(figures, SEEK_10, PLAIN.name).median, 0.40),
        Bar(f"{where} step / checkpointing", ratio_of(figures, SEEK_10, CHECKPOINTING.name).median, 0.45),
        Bar(f"{where} saved / plain", saved_mib / plain_mib, 0.14),
        Bar(f"{LEAN.name}, {BARS_AT}: step / plain", ratio_of(figures, LEAN.name, PLAIN.name).median, 1.02),
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds")
    parser.add_argument("--score", default=SeekConfig.score, help="what selects in the rows with a ratio")
    parser.add_argument("--quick", action="store_true", help="256 tokens, fp32, 2 repeats")
    add_common_options(parser)
    options = parser.parse_args(argv)
    if options.quick:
        options.tokens, options.dtypes, options.repeats = [256], ["fp32"], 2
    folder = ROOT / "outputs" if options.quick else EVIDENCE
    options.output = options.output or folder / "bench_step.json"
    return options


def main(argv: Sequence[str] | None = None, load: Callable = load_smollm2) -> int:
    """Measures what is missing, prints and writes the tables; `load` gives the model and its tokenizer."""
    options = parse(argv)
    rows = (*BASELINES, *seek_rows(options.score))
    key = {**environment(), "repeats": options.repeats, "score": options.score}
    results = Results(options.output, key, options.fresh)
    names = {f"{dtype}, {options.batch} x {n}": (dtype, n) for dtype in options.dtypes for n in options.tokens}
    missing = [name for name in names if name not in results]
    if missing:
        model, tokenizer = load()
        model.train().config.use_cache = False
    with tqdm(total=len(missing) * len(rows) * (1 + options.repeats), unit="step") as progress:
        for name in missing:
            progress.set_description(name)
            dtype, n = names[name]
            ids = real_text(tokenizer, options.batch, n).to(DEVICE)
            results[name] = measure(model, rows, ids, dtype, options.repeats, progress.update)
    found = bars(results.cells) if options.bars else []
    sections = [f"# One training step of SmolLM2-135M\n\n{in_one_line(key)}\n\n{NOTES}"]
    sections += [f"## {name} tokens\n\n{table(results.cells[name])}" for name in names]
    sections += [f"## Bars\n\n```\n{judge(found)}\n```"] if options.bars else []
    results.publish("\n\n".join(sections))
    return exit_status(found, options.strict)


if __name__ == "__main__":
    sys.exit(main())
