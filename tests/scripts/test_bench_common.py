import argparse
import json

import pytest


@pytest.fixture
def common(script):
    return script("bench_common")


def test_results_survive_an_interruption(common, tmp_path):
    path = tmp_path / "evidence" / "bench.json"
    common.Results(path, {"commit": "a"})["cell"] = {"seconds": [1.0]}
    again = common.Results(path, {"commit": "a"})
    assert "cell" in again
    assert again.cells == {"cell": {"seconds": [1.0]}}
    assert [file.name for file in path.parent.iterdir()] == ["bench.json"]


def test_results_of_another_environment_are_dropped(common, tmp_path, capsys):
    path = tmp_path / "bench.json"
    common.Results(path, {"commit": "a"})["cell"] = 1
    assert "cell" not in common.Results(path, {"commit": "b"})
    assert "starting over" in capsys.readouterr().out
    assert "cell" not in common.Results(path, {"commit": "a"}, fresh=True)


def test_a_report_stands_beside_its_figures(common, tmp_path):
    results = common.Results(tmp_path / "bench.json", {})
    results["cell"] = 1
    results.publish("# Report")
    assert (tmp_path / "bench.md").read_text() == "# Report\n"
    stored = json.loads((tmp_path / "bench.json").read_text())
    assert (stored["key"], stored["cells"]) == ({}, {"cell": 1})


def test_every_cell_says_where_it_was_made(common, tmp_path, monkeypatch):
    path, known = tmp_path / "bench.json", common.environment()
    for name, changed in (("first", {}), ("second", {"commit": "b"}), ("third", {"cpu": "abacus"})):
        monkeypatch.setattr(common, "environment", lambda changed=changed: {**known, **changed})
        results = common.Results(path, {})
        results[name] = 1
    assert [results.made_here(name) for name in ("first", "second", "third")] == [False, False, True]
    monkeypatch.setattr(common, "environment", lambda: known)
    results = common.Results(path, {})
    assert [results.made_here(name) for name in ("first", "second", "third")] == [True, True, False]
    first, second, third = results.origins().split("\n\n")
    assert first == common.in_one_line(known)
    assert "commit b" in second and "cpu abacus" in third
    # an environment from which nothing is left is not named
    results["second"] = results["third"] = 2
    assert results.origins() == first


def test_spread(common):
    assert f"{common.Spread.of([3.0, 1.0, 2.5]):.1f}" == "2.5 (1.0..3.0)"


def test_markdown_table(common):
    table = common.markdown_table(("row", "s"), [("plain", "2.0"), ("seek", "1.0")])
    assert table == "| row | s |\n| --- | ---: |\n| plain | 2.0 |\n| seek | 1.0 |"


def test_bars(common):
    kept, broken = common.Bar("step / plain", 0.4, 0.4), common.Bar("saved / plain", 0.15, 0.14)
    assert common.judge([kept, broken]) == "PASS  step / plain <= 0.4: 0.4000\nFAIL  saved / plain <= 0.14: 0.1500"
    assert "no bar" in common.judge([])
    assert common.exit_status([kept, broken], strict=True) == 1
    assert common.exit_status([kept, broken], strict=False) == common.exit_status([kept], strict=True) == 0


def test_environment_names_what_figures_depend_on(common):
    found = common.environment()
    assert {"cpu", "cores", "torch", "transformers", "hf_tokenseek", "commit"} <= set(found)
    assert common.in_one_line({"torch": "2", "cores": 2}) == "torch 2, cores 2"


def test_common_options(common):
    parser = argparse.ArgumentParser()
    common.add_common_options(parser)
    assert parser.parse_args(["--bars", "--strict"]).bars
