import json
import statistics

import pytest
import torch

FULL, DEFAULT = "evidence context=1.0", "evidence context=0.1"
OPTIONS = ["--tokens", "24", "--batch", "2", "--batches", "2", "--disjoint", "4", "--data", "long-prompt"]


class Tokenizer:
    pad_token_id = 0


def sequences(tokenizer, split, length):
    drawn = torch.randint(1, 128, (8, length), generator=torch.Generator().manual_seed(0)).tolist()
    return [{"input_ids": ids, "labels": [-100] * (length - 4) + ids[-4:]} for ids in drawn]


@pytest.fixture
def bench(script, monkeypatch):
    bench = script("bench_fidelity")
    configurations = [("evidence", "context", share) for share in (1.0, 0.1)]
    monkeypatch.setattr(bench, "DATA", dict.fromkeys(bench.DATA, (sequences, configurations)))
    return bench


@pytest.fixture
def call(bench, tiny_llama, tmp_path):
    """Runs the bench; returns its cells."""
    output = tmp_path / "fidelity.json"

    def call(*options):
        fixed = [*OPTIONS, "--output", str(output)]
        assert bench.main([*fixed, *options], lambda: (tiny_llama(), Tokenizer())) == 0
        return json.loads(output.read_text())["cells"]

    return call


@pytest.mark.parametrize("options", [[], ["--lora"]], ids=["full", "lora"])
def test_everything_selected_has_the_full_gradient(call, options):
    cells = call(*options)
    groups = {"all", "q", "k", "v", "o", "mlp"} | ({"norm", "embed"} if not options else set())
    for whole, tenth in zip(cells[FULL], cells[DEFAULT], strict=True):
        assert whole["rows"] == 1 > tenth["rows"]
        assert whole["same batch"].keys() == groups
        assert all(cosine == pytest.approx(1, abs=1e-5) for cosine in whole["same batch"].values())
        assert whole["norm ratio"] == pytest.approx(1, abs=1e-5)
        assert whole["disjoint"] == pytest.approx(whole["disjoint, full batch"], abs=1e-5)
        assert tenth["same batch"]["all"] < 0.999
        assert tenth["disjoint, full batch"] == whole["disjoint, full batch"]


def test_cosine_with_disjoint_sequences_is_that_of_their_mean_gradient(call, tiny_llama):
    found = [figures["disjoint, full batch"] for figures in call()[FULL]]
    model, data = tiny_llama(), sequences(None, None, 24)

    def gradient(records):
        model.zero_grad()
        ids, labels = (torch.tensor([record[name] for record in records]) for name in ("input_ids", "labels"))
        # every sequence has as many labels, so the mean over a batch is the mean over its sequences
        model(ids, labels=labels).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()]).double()

    others = gradient(data[4:])
    truth = [torch.cosine_similarity(gradient(data[i : i + 2]), others, dim=0).item() for i in (0, 2)]
    assert found == pytest.approx(truth, abs=1e-5)


def test_goes_on_with_what_is_missing_and_keeps_figures_of_other_code(bench, call, tmp_path, monkeypatch):
    call()
    path = tmp_path / "fidelity.json"
    stored = json.loads(path.read_text())
    stored["environments"][0]["commit"] = "earlier"
    for part in ("cells", "made_in"):
        del stored[part][DEFAULT]
    stored["cells"][FULL][0]["norm ratio"] = 7.0
    path.write_text(json.dumps(stored))
    again = call()
    assert again.keys() == {FULL, DEFAULT}
    assert again[FULL][0]["norm ratio"] == 7.0
    last = (tmp_path / "fidelity.md").read_text().splitlines()[-3:]
    assert last[0].endswith("commit earlier") and "commit" in last[2] and "earlier" not in last[2]
    monkeypatch.setattr(bench, "measure", None)
    assert call() == again


def test_one_file_has_one_data_set(bench, tmp_path, capsys):
    with pytest.raises(SystemExit):
        bench.main([*OPTIONS, "labelled", "--output", str(tmp_path / "both.json")], None)
    assert "Give one of them" in capsys.readouterr().err


def test_bars_are_judged_on_means_and_show_the_batches(bench, tmp_path):
    results = bench.Results(tmp_path / "unwritten.json", {"data": "long-prompt", "lora": False})
    assert bench.bars(results) == []
    own, full = (0.45, 0.30), (0.50, 0.28)
    results[DEFAULT] = [
        {"same batch": {"all": same}, "disjoint": a, "disjoint, full batch": b}
        for same, a, b in zip((0.9, 0.98), own, full, strict=True)
    ]
    same, disjoint = bench.bars(results)
    assert same.value == pytest.approx(0.06) and same.passed
    assert disjoint.value == pytest.approx(1 - statistics.mean(own) / statistics.mean(full)) and not disjoint.passed
    assert "(by batch -0.071..0.100)" in str(disjoint)
    results.key["data"] = "labelled"
    assert bench.bars(results) == []
