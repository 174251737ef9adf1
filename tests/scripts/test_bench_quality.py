import json
import math
import statistics

import pytest
import torch

FULL, SEEK, RANDOM = "full", "seek evidence", "seek random"
LATER = f"{SEEK}, equal time"
RECORD = {"input_ids": list(range(1, 41)), "labels": [*[-100] * 30, *range(31, 41)]}
KEY = {"task": "docstrings", "steps": 16}


class Tokenizer:
    pad_token_id = 0


@pytest.fixture
def bench(script, monkeypatch):
    bench = script("bench_quality")
    # no batch depends on how the data are shuffled
    monkeypatch.setattr(bench, "TASKS", {"docstrings": lambda tokenizer, split, max_length: [RECORD] * 4})
    return bench


@pytest.fixture
def results(bench, tmp_path):
    return bench.Results(tmp_path / "unwritten.json", KEY)


@pytest.fixture
def call(bench, tiny_llama, tmp_path, monkeypatch):
    """Runs the bench; returns its cells, and what was trained for them: learning rate and steps of each run."""
    trained = []
    loss = bench.Bench.loss

    def noted(self, method, split, seed, rate, steps):
        if steps:
            trained.append((split, seed, rate, steps))
        return loss(self, method, split, seed, rate, steps)

    monkeypatch.setattr(bench.Bench, "loss", noted)
    output = tmp_path / "quality.json"

    def call(*options):
        trained.clear()
        fixed = ["--steps", "2", "--rate-steps", "1", "--timing-repeats", "2", "--output", str(output)]
        assert bench.main([*fixed, *options], lambda: (tiny_llama(), Tokenizer())) == 0
        return json.loads(output.read_text())["cells"], list(trained)

    return call


def test_goes_on_with_what_a_new_method_lacks(bench, call, tmp_path):
    cells, trained = call("--methods", FULL, SEEK, LATER, "--seeds", "0")
    assert len(trained) == 3 + 3 + 3
    assert all(len(cells[f"seconds | {name}"]) == 2 for name in (FULL, SEEK))
    assert f"seconds | {RANDOM}" not in cells
    again, trained = call("--methods", FULL, SEEK, LATER, RANDOM, "--seeds", "0")
    # it takes the learning rate of the other score, and the others are there
    assert trained == [("test", 0, cells[f"run | {SEEK} | 0"]["rate"], 2)]
    assert again.keys() - cells.keys() == {f"seconds | {RANDOM}", f"run | {RANDOM} | 0"}
    assert {name: again[name] for name in cells} == cells
    assert call("--table-only")[1] == []
    assert f"| {RANDOM} | " in (tmp_path / "quality.md").read_text()


def test_a_run_at_a_rate_that_is_no_longer_chosen_is_run_again(bench, call, tmp_path):
    cells, _ = call("--methods", FULL, SEEK, "--seeds", "0", "1")
    path = tmp_path / "quality.json"
    stored = json.loads(path.read_text())
    other = next(rate for rate in bench.RATES[False] if rate != cells[f"run | {FULL} | 0"]["rate"])
    stored["cells"][f"rate | {FULL} | {other}"] = 0.0
    path.write_text(json.dumps(stored))
    again, trained = call("--methods", FULL, SEEK, "--seeds", "0")
    assert trained == [("test", 0, other, 2)]
    assert again[f"run | {FULL} | 0"]["rate"] == other
    assert {name for name in again if again[name] != stored["cells"][name]} == {f"run | {FULL} | 0"}
    # until the other seed is run again its loss stands in a row of its own
    rows = [line for line in (tmp_path / "quality.md").read_text().splitlines() if line.startswith(f"| {FULL} |")]
    assert [row.split(" | ")[3] for row in rows] == ["1", "1"]


def test_training_is_a_plain_loop(bench, tiny_llama, call):
    cells, _ = call("--methods", FULL, "--seeds", "0")
    model, rate = tiny_llama(), cells[f"run | {FULL} | 0"]["rate"]
    ids, labels = (torch.tensor([RECORD[name]] * 2) for name in ("input_ids", "labels"))
    # warm-up over one step, and the decay begins at the full rate
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)

    def loss():
        return torch.nn.functional.cross_entropy(model(ids).logits[:, 29:-1].flatten(0, 1), labels[:, 30:].flatten())

    before = loss().item()
    for _ in range(2):
        optimizer.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert cells["before"] == pytest.approx(before, rel=1e-5)
    assert cells[f"run | {FULL} | 0"]["loss"] == pytest.approx(loss().item(), rel=1e-5)
    assert loss().item() < before - 1e-4


def test_the_best_rate_is_chosen_never_one_that_diverged_and_its_edge_is_marked(bench, results):
    for rate, loss in zip(bench.RATES[True], (math.nan, 2.5, 2.0, 3.0), strict=True):
        results[f"rate | LoRA | {rate}"] = loss
    assert bench.choice(results, "LoRA") == (bench.RATES[True][2], 16)
    tried = bench.tried(results, "LoRA")
    assert [bench.marked(rate, tried) for rate in bench.RATES[True]] == ["0.001*", "0.002", "0.004", "0.008*"]
    # a file from before the grid went so far
    del results.cells[f"rate | LoRA | {bench.RATES[True][3]}"]
    assert bench.marked(0.004, bench.tried(results, "LoRA")) == "0.004*"
    assert bench.marked(2e-4, {}) == "0.0002"


def test_steps_in_equal_time(bench, results):
    results[f"seconds | {FULL}"], results[f"seconds | {RANDOM}"] = [4.0, 6.0, 5.0], [1.9, 2.1, 2.0]
    results[f"rate | {SEEK} | 0.0002"] = 1.0
    assert bench.choice(results, RANDOM) == (2e-4, 16)
    assert bench.choice(results, f"{RANDOM}, equal time") == (2e-4, 40)
    # never none
    results[f"seconds | {RANDOM}"] = [1000.0]
    assert bench.choice(results, f"{RANDOM}, equal time") == (2e-4, 1)


def test_times_of_two_machines_do_not_compare(bench, results, tmp_path):
    results[f"seconds | {FULL}"], results[f"seconds | {SEEK}"] = [4.0], [2.0]
    stored = json.loads(results.path.read_text())

    def reopened(**environment):
        moved = {**stored, "environments": [{**stored["environments"][0], **environment}]}
        results.path.write_text(json.dumps(moved))
        return bench.Results(results.path, KEY)

    full, seek, random = (f"seconds | {name}" for name in (FULL, SEEK, RANDOM))
    assert bench.times_to_take(reopened(commit="another"), [SEEK, RANDOM]) == [random]
    assert bench.times_to_take(reopened(cpu="another"), [SEEK, LATER]) == []
    # what is missing comes last: until then it can be seen that the others have to be taken
    assert bench.times_to_take(reopened(cpu="another"), [SEEK, RANDOM]) == [full, seek, random]


def test_bars_want_one_choice_and_several_seeds(bench, results):
    losses = {FULL: (3.0, 3.1, 3.2), SEEK: (3.1, 3.2, 3.6), LATER: (3.0, 3.0, 3.0)}
    for name, own in losses.items():
        assert bench.bars(results) == []
        for seed, loss in enumerate(own):
            results[f"run | {name} | {seed}"] = {"loss": loss, "rate": 2e-4, "steps": 16}
    at_equal_steps, at_equal_time = bench.bars(results)
    assert at_equal_steps.value == pytest.approx(0.2)
    assert at_equal_steps.limit == pytest.approx(statistics.stdev(losses[SEEK])) and at_equal_steps.passed
    assert (at_equal_time.value, at_equal_time.limit) == (pytest.approx(-0.1), 0) and at_equal_time.passed
    results[f"run | {SEEK} | 2"] = {"loss": 3.6, "rate": 4e-4, "steps": 16}
    assert bench.bars(results) == []
