"""Two steps of a tiny model through the bench of pre-training."""

import json
import math
from pathlib import Path

import pytest
import torch

from recipes import pretrain
from recipes.python_docstrings import read_source

TINY = ["--hidden_size", "32", "--intermediate_size", "80", "--num_hidden_layers", "2", "--num_attention_heads", "4"]
TINY += ["--vocab_size", "400", "--seq_length", "32", "--eval_sequences", "8", "--use_cpu", "true"]
ROWS = FULL, VELORA, GALORE = "full", "VeLoRA 8, mlp + down", "GaLore, rank 64"


@pytest.fixture
def bench(script, monkeypatch):
    files = {"train": [json.decoder, json.encoder], "validation": [json.scanner], "test": [json]}
    texts = {split: [read_source(Path(module.__file__)) for module in modules] for split, modules in files.items()}
    monkeypatch.setattr(pretrain, "source_files", texts.__getitem__)
    return script("bench_pretrain")


@pytest.fixture
def run(bench, tmp_path):
    """Runs the bench with three of its rows; returns its cells."""

    def call() -> dict:
        output = tmp_path / "pretrain.json"
        argv = ["--steps", "2", "--rate-steps", "1", "--timing-repeats", "2", "--seeds", "0", "1"]
        bench.main([*argv, "--rows", *ROWS, "--output", str(output), *TINY])
        return json.loads(output.read_text())["cells"]

    return call


def test_two_steps_of_three_rows(bench, run, monkeypatch, tmp_path):
    pytest.importorskip("galore_torch")
    cells = run()
    # 400 tokens, each as likely as any other
    assert cells["before"] == pytest.approx(math.log(400), rel=0.05)
    for row in ROWS:
        losses = [cells[f"run | {row} | {seed}"] for seed in (0, 1)]
        # the first seed's weights are those before training
        assert losses[0] < cells["before"] and losses[0] != losses[1]
        assert {f"rate | {row} | {rate}" for rate in bench.ROWS[row].rates} <= cells.keys()
        assert len(cells[f"costs | {row}"]["step_seconds"]) == 3
    parameters = 2 * 400 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 80) + 5 * 32
    full, velora, galore = (cells[f"costs | {row}"] for row in ROWS)
    assert full["gradient_bytes"] == velora["gradient_bytes"] == galore["gradient_bytes"] == 4 * parameters
    # two moments a parameter, and AdamW's step counter of each tensor
    tensors = 2 * 9 + 3
    assert full["optimizer_bytes"] == velora["optimizer_bytes"] == 4 * (2 * parameters + tensors)
    assert full["saved_mib"] == galore["saved_mib"] > velora["saved_mib"] > 0

    table = (tmp_path / "pretrain.md").read_text()
    assert all(f"| {row} | " in table for row in ROWS) and "APOLLO" not in table
    # what has been run is not run again
    monkeypatch.setattr(bench.PretrainTrainer, "train", None)
    assert run() == cells


def test_bytes_of_what_an_optimizer_keeps(bench):
    class Projector:
        def __init__(self):
            self.matrix, self.rank = torch.zeros(2, 3), 2

    state = [{"step": 1, "exp_avg": torch.zeros(4), "projector": Projector()}, {"pair": (torch.zeros(1), None)}]
    assert bench.tensor_bytes(state) == 4 * (4 + 6 + 1)


def test_the_best_rate_is_chosen_and_never_one_that_diverged(bench):
    rates = bench.ROWS[FULL].rates
    results = bench.Results(Path("unwritten.json"), {})
    results.cells = {f"rate | full | {rate}": loss for rate, loss in zip(rates, (math.nan, 3.0, 4.0), strict=True)}
    assert bench.chosen_rate(results, FULL) == rates[1]
