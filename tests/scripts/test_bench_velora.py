import json

import pytest


@pytest.fixture
def bench(script):
    return script("bench_velora")


class ByteTokenizer:
    pad_token_id = 0

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [byte % 128 for byte in text.encode()]}


def test_runs_end_to_end_and_goes_on_where_it_stopped(bench, tiny_llama, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "GROUPS", 4)
    monkeypatch.setattr(
        bench, "docstrings", lambda *_: [{"input_ids": [1, 2, 3, 4, 5], "labels": [-100, 2, 3, 4, 5]}] * 4
    )
    options = ["--tokens", "64", "--repeats", "1", "--output", str(tmp_path / "velora.json"), "--bars"]

    def load():
        return tiny_llama(), ByteTokenizer()

    assert bench.main([*options, "--seeds"], load) == 0
    assert bench.main([*options, "--seeds", "0", "--steps", "16"], load) == 0
    cells = json.loads((tmp_path / "velora.json").read_text())["cells"]
    found = {name.partition(" | ")[2]: figures for name, figures in cells.items() if name.startswith("bytes | ")}
    assert set(found) == {row.name for row in bench.ROWS}
    for kind in ("full", "LoRA"):
        plain, ours, state = (found[f"{kind}: {name}"] for name in ("plain", "VeLoRA", "VeLoRA, state"))
        assert ours["saved_mib"] < plain["saved_mib"] and ours["gradient_mib"] == plain["gradient_mib"]
        assert state["gradient_mib"] < ours["gradient_mib"] and state["state_mib"] < ours["state_mib"]
    assert sum(name.startswith("loss | ") for name in cells) == len(bench.LOSSES)
    # everything is there: nothing is measured any more
    monkeypatch.setattr(bench, "count_bytes", None)
    monkeypatch.setattr(bench, "train", None)
    assert bench.main([*options, "--seeds", "0"], load) == 0
    assert "| full: VeLoRA |" in capsys.readouterr().out
