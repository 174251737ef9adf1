import json

import pytest


@pytest.fixture
def bench(script):
    return script("bench_step")


@pytest.fixture
def ways(script):
    return script("bench_rows")


def byte_tokenizer(text, add_special_tokens):
    return {"input_ids": [byte % 128 for byte in text.encode()]}


@pytest.fixture
def load(tiny_llama):
    return lambda: (tiny_llama(), byte_tokenizer)


def figures(ways, plain, seek):
    rows = {row.name: {"saved_mib": 100.0, "seconds": plain} for row in ways.BASELINES}
    return {**rows, ways.SEEK_10: {"saved_mib": 12.0, "seconds": seek}}


def test_runs_end_to_end_and_goes_on_where_it_stopped(bench, ways, load, tmp_path, capsys, monkeypatch):
    options = ["--repeats", "1", "--batch", "2", "--output", str(tmp_path / "step.json")]
    assert bench.main([*options, "--tokens", "64", "--dtypes", "fp32"], load) == 0
    assert bench.main([*options, "--tokens", "64", "--dtypes", "fp32", "bf16", "--bars"], load) == 0
    cells = json.loads((tmp_path / "step.json").read_text())["cells"]
    assert list(cells) == ["fp32, 2 x 64", "bf16, 2 x 64"]
    rows = [row.name for row in (*ways.BASELINES, *ways.seek_rows("evidence"))]
    for cell in cells.values():
        assert list(cell) == rows
        assert all(len(row["seconds"]) == 1 and row["seconds"][0] > 0 for row in cell.values())
        assert cell[ways.SEEK_10]["saved_mib"] < 0.5 * cell["plain"]["saved_mib"]
        assert cell[ways.SEEK_10_CHECKPOINTING]["saved_mib"] < cell[ways.SEEK_10]["saved_mib"]
    report = (tmp_path / "step.md").read_text()
    assert "## fp32, 2 x 64 tokens" in report
    assert "no bar applies" in report
    # everything is there: nothing is loaded any more
    monkeypatch.setattr(bench, "measure", None)
    assert bench.main([*options, "--tokens", "64", "--dtypes", "fp32"], None) == 0
    assert "| plain |" in capsys.readouterr().out


def test_the_model_is_given_back_as_it_was(bench, ways, tiny_llama):
    import torch

    model, ids = tiny_llama(), torch.arange(64).view(1, 64)
    attention = model.config._attn_implementation
    for row in (ways.CHECKPOINTING, *ways.seek_rows("evidence")):
        assert bench.count_saved_mib(model, row, ids, "fp32") > 0
        assert model.config._attn_implementation == attention
        assert "forward" not in vars(model)
        assert not model.model.gradient_checkpointing


def test_baselines_have_one_loss(bench, ways, tiny_llama):
    import torch

    model, ids = tiny_llama(), torch.arange(64).view(2, 32)
    losses = []
    for row in ways.BASELINES:
        with ways.prepared(model, row):
            losses.append(bench.forward(model, row, ids, "fp32").item())
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)


def test_ratios_are_of_medians_and_their_range_is_within_rounds(bench, ways):
    found = figures(ways, [4.0, 8.0, 5.0], [2.0, 2.0, 3.0])
    ratio = bench.ratio_of(found, ways.SEEK_10, ways.PLAIN.name)
    assert ratio == (2.0 / 5.0, 2.0 / 8.0, 3.0 / 5.0)
    assert "| seek ratio 0.1 | 2 (2..3) | 0.40 (0.25..0.60) |" in bench.table(found)


def test_bars_hold_for_their_cell_only(bench, ways):
    found = bench.bars({bench.BARS_AT: figures(ways, [5.0], [2.1])})
    assert [bar.value for bar in found] == pytest.approx([0.42, 0.42, 0.12, 1.0])
    assert [bar.passed for bar in found] == [False, True, True, True]
    assert bench.bars({"bf16, 1 x 1024": figures(ways, [5.0], [2.1])}) == []


def test_labels_of_a_share_and_the_sizes_planned_for_them(ways):
    import torch

    from hf_tokenseek.seek.batch import prepare

    ids = torch.arange(1, 101).view(2, 50)
    for row in ways.seek_rows("evidence"):
        labels = ways.label(ids, row.labelled)
        assert prepare(row.seek, ids, labels).sizes == ways.planned_sizes(row, ids)
    assert (ways.label(ids, 0.05) != -100).sum(1).tolist() == [3, 3]


def test_real_text_has_the_exact_length(bench):
    assert bench.real_text(byte_tokenizer, 2, 300).shape == (2, 300)
    with pytest.raises(ValueError, match="Lower --batch"):
        bench.real_text(byte_tokenizer, 10**6, 10**6)
