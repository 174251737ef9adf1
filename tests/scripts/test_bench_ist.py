import json

import pytest


@pytest.fixture
def bench(script):
    return script("bench_ist")


class ByteTokenizer:
    pad_token_id = 0


def test_runs_end_to_end_and_goes_on_where_it_stopped(bench, tiny_llama, tmp_path, capsys, monkeypatch):
    data = [{"input_ids": [1, 2, 3, 4, 5, 6], "labels": [-100, 2, 3, 4, 5, 6]}] * 48
    monkeypatch.setattr(bench, "docstrings", lambda *_: data)
    monkeypatch.setattr(bench, "long_prompts", lambda *_: data)
    options = [
        "--repeats",
        "1",
        "--steps",
        "16",
        "--max-length",
        "6",
        "--output",
        str(tmp_path / "ist.json"),
        "--bars",
    ]

    def load():
        return tiny_llama(), ByteTokenizer()

    assert bench.main([*options, "--seeds"], load) == 0
    assert bench.main([*options, "--seeds", "0"], load) == 0
    cells = json.loads((tmp_path / "ist.json").read_text())["cells"]
    curves = {name: cells[f"bytes | {name}"] for name in bench.ROWS}
    assert all(len(curve) == 16 for curve in curves.values())
    for sparse, dense in ((bench.IST, bench.LORA), (bench.LISA_ROW, bench.FULL), (bench.FROZEN, bench.LISA_ROW)):
        for part in ("gradients", "state"):
            assert max(step[part] for step in curves[sparse]) < curves[dense][-1][part]
        assert bench.peak(curves[sparse]) < bench.peak(curves[dense])
    # one of three layers at a time: the rest follows from the formula, to the byte where the lowest layer was drawn
    assert min(step["lowest"] for step in curves[bench.RANDOM]) == 0
    saved = bench.peak(curves[bench.LORA]) - bench.peak(curves[bench.RANDOM])
    counters = 2 * 7 * 2 * 4 / bench.MIB  # AdamW's step counts
    assert saved == pytest.approx(bench.guaranteed(tiny_llama().config, 2 * 6) + counters, rel=1e-9)
    assert sum(name.startswith("loss | ") for name in cells) == len(bench.TRAINED)
    monkeypatch.setattr(bench, "run", None)
    assert bench.main([*options, "--seeds", "0"], load) == 0
    assert "| LoRA, IST |" in capsys.readouterr().out
