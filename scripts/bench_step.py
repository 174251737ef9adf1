"""
Time and saved activations of one training step (forward and backward, no optimizer) of SmolLM2-135M on real text.

    python scripts/bench_step.py --bars                     # 512, 1024, 2048 tokens; fp32 and bf16
    python scripts/bench_step.py --quick                    # 256 tokens, fp32, 2 repeats; written to outputs/
    python scripts/bench_step.py --tokens 1024 --dtypes fp32 --repeats 9

The rows take turns, so that a drift of the machine hits all alike; the first step of each row is thrown away (its saved
activations are counted). Interrupted, it goes on with the first cell that is not finished. Run nothing beside it.
"""

import argparse
import time
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from bench_common import EVIDENCE, MIB, ROOT, Bar, Results, Spread, add_common_options, environment, exit_status
from bench_common import in_one_line, judge, markdown_table
from bench_rows import BASELINES, CHECKPOINTING, PLAIN, SEEK_10, Row, forward_loss, label, prepared, seek_rows
from torch import Tensor, nn
from tqdm import tqdm

from hf_tokenseek import SeekConfig
from hf_tokenseek.memory import SavedActivations

NOTES = """Seconds: median (lowest..highest) of the repeats. A ratio is the quotient of the medians, in brackets the range of
the quotients within a round. bf16 is autocast over fp32 weights. The seek rows with a ratio have labels everywhere. What plain
training and checkpointing cost does not depend on the labels, so their rows stand for 5 % labels too."""


def real_text(tokenizer, batch: int, tokens: int) -> Tensor:
    """`(batch, tokens)` token ids of functions of the standard library and their docstrings."""
    from recipes.python_docstrings import python_docstrings

    wanted, ids = batch * tokens, []
    for record in python_docstrings("train"):
        ids += tokenizer(f"{record['prompt']}\n\n{record['completion']}\n\n", add_special_tokens=False)["input_ids"]
        if len(ids) >= wanted:
            return torch.tensor(ids[:wanted]).view(batch, tokens)
    raise ValueError(f"The docstring task has {len(ids)} tokens, {wanted} are asked for. Lower --batch or --tokens.")


def train_step(model: nn.Module, row: Row, ids: Tensor, dtype: str, saved: SavedActivations | None = None) -> float:
    """Seconds of one forward and backward; with `saved`, its bytes at the end of forward are left in it."""
    labels = label(ids, row.labelled)
    model.zero_grad(set_to_none=True)
    with prepared(model, row):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"), saved or nullcontext():
            loss = forward_loss(model, row, ids, labels)
        saved_mib = saved.mib if saved else 0.0
        loss.backward()
        seconds = time.perf_counter() - start
    return saved_mib if saved else seconds


def measure(model: nn.Module, rows: Sequence[Row], ids: Tensor, dtype: str, repeats: int, advance) -> dict:
    """`{row name: {"saved_mib": float, "seconds": list[float]}}`, one entry of `seconds` a round."""
    figures = {}
    for row in rows:
        # the warm-up step: its time is not kept
        figures[row.name] = {"saved_mib": train_step(model, row, ids, dtype, SavedActivations(model)), "seconds": []}
        advance()
    for _ in range(repeats):
        for row in rows:
            figures[row.name]["seconds"].append(train_step(model, row, ids, dtype))
            advance()
    return figures
