"""The kernels' benchmark at tiny sizes: every way to a result gives that result, and the table shows them all."""

import importlib
import json
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("bench_kernels")


@pytest.fixture
def shape(bench):
    return bench.Shape("tiny", hidden=32, intermediate=48, heads=4, kv_heads=2, dim=16, vocabulary=50)


def test_every_way_gives_the_same_and_is_timed_forward_and_backward(bench, shape, device, tmp_path, capsys):
    if device == "cuda":
        pytest.skip("scripts/test_gpu.sh runs the benchmark itself")

    def stopwatch(call):
        call()
        return 2.0, 1.0, 3.0

    output = tmp_path / "bench.json"
    options = ["--tokens", "40", "--output", str(output)]
    assert bench.main(options, device, [shape], stopwatch) == 0
    cells = json.loads(output.read_text())["cells"]
    assert list(cells) == [f"{case.__name__}, tiny, 40 tokens" for case in bench.CASES]
    for name, figures in cells.items():
        assert {"triton"} < set(figures)
        forward_only = name.startswith(("attention_mass", "head_statistics", "compress", "block_scores"))
        for found in figures.values():
            assert found == {"forward": [2.0, 1.0, 3.0], "backward": None if forward_only else [2.0, 1.0, 3.0]}
    report = output.with_suffix(".md").read_text()
    assert "| rms_norm, tiny, 40 tokens | eager | 2.000 (1.000..3.000) | 2.000 (1.000..3.000) | 1.00 |" in report
    # everything is there: nothing is measured any more
    assert bench.main(options, device, [shape], None) == 0
    assert report in capsys.readouterr().out


def test_a_wrong_result_is_not_timed(bench, shape, device):
    import torch

    wrong = [bench.Contender("triton", lambda: torch.ones(3)), bench.Contender("other", lambda: torch.zeros(3))]
    with pytest.raises(RuntimeError, match="'other' differs from the kernel by 1 of the largest value"):
        bench.measure(wrong, lambda call: (1.0, 1.0, 1.0))


def test_a_way_that_needs_too_much_memory_is_a_line_of_the_table(bench):
    import torch

    def too_much():
        raise torch.OutOfMemoryError

    ways = [bench.Contender("triton", lambda: torch.ones(3)), bench.Contender("other", too_much)]
    figures = bench.measure(ways, lambda call: (1.0, 1.0, 1.0))
    lines = bench.table({"cell": figures}).splitlines()
    assert lines[2:] == [
        "| cell | triton | 1.000 (1.000..1.000) | - | 1.00 |",
        "| cell | other | out of memory | out of memory | - |",
    ]
