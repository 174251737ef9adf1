import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import Trainer, TrainerCallback

from hf_tokenseek.callbacks import IstCallback, LeanCallback, ReportCallback, SeekCallback
from hf_tokenseek.report import page
from hf_tokenseek.report.record import read_events, read_run
from tests.tiny_training import SELECTS, arguments, examples, trainer

pytest.importorskip("matplotlib")

IST = {"layers": 0.34, "period": 1}


class Killed(Exception):
    pass


class Kill(TrainerCallback):
    """Ends the process, as far as the callbacks can tell, after so many steps."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


class Words:
    """A tokenizer as far as the report needs one."""

    def decode(self, ids):
        return f"<{ids[0]}>"


@pytest.fixture
def no_page(monkeypatch):
    """Records only: drawing is tested elsewhere."""
    monkeypatch.setattr(page, "write_page", lambda folders, output: output)


@pytest.fixture
def build(tiny_llama, no_page, tmp_path):
    """Builds a trainer of a tiny model in a folder of its own."""

    def built(name, *callbacks, seek=SELECTS, report=None, **options):
        model = tiny_llama()
        rows = examples(6)
        args = arguments(tmp_path / name, seek, max_steps=6, **options)
        made = trainer(model, args, callbacks=[report or ReportCallback(), *callbacks])
        made.train_dataset = rows
        return made

    return built


def record(trainer):
    return read_run(trainer.args.output_dir)


def test_a_run_is_recorded_whole(build):
    made = build("run", ist=IST, lean=True)
    made.train()
    made.evaluate()
    found = record(made)
    assert found.logs == [pytest.approx(entry, rel=1e-4) for entry in made.state.log_history]
    # six sequences, two epochs of three steps: each was trained on twice
    assert sorted(found.samples) == list(range(6))
    assert sorted(found.samples[n]["ids"] for n in range(6)) == sorted(row["input_ids"] for row in examples(6))
    assert sorted(visit["sample"] for visit in found.visits) == sorted([*range(6), *range(6)])
    assert {visit["step"] for visit in found.visits} == {1, 2, 3, 4, 5, 6}
    assert [draw["step"] for draw in found.draws] == [1, 2, 3, 4, 5, 6]
    assert all(draw["of"] == 3 and len(draw["layers"]) == 1 for draw in found.draws)
    assert found.run["methods"]["seek"]["context"] == 0.2
    assert found.run["methods"]["ist"]["period"] == 1
    assert found.run["methods"]["lean"] is True
    assert found.run["arguments"]["learning_rate"] == 1e-2
    assert not {"seek", "ist", "lean"} & set(found.run["arguments"])
    assert found.run["model"]["layers"] == 3
    assert made._callback(SeekCallback).handle.observers == []


def test_visits_are_what_was_trained(build):
    """Labels are the last five tokens, so the rows before them carry the loss; a fifth of the others is evidence."""
    made = build("run")
    made.train()
    for visit in record(made).visits:
        n = len(visit["kinds"])
        assert len(visit["scores"]) == len(visit["terms"]["attention mass"]) == n
        assert visit["kinds"][n - 6 : n - 1] == "22222"
        free = [place for place in range(n) if not n - 6 <= place < n - 1]
        best = sorted(free, key=lambda place: -visit["scores"][place])[: -(-len(free) // 5)]
        assert {place for place in free if visit["kinds"][place] == "1"} == set(best)


def test_histograms_count_each_token_of_the_run(build):
    made = build("run", logging_steps=4)
    made.train()
    positions = record(made).positions
    total = sum(sum(event[kind]) for event in positions for kind in ("ditched", "evidence", "loss"))
    assert total == 2 * sum(len(row["input_ids"]) for row in examples(6))
    assert sum(sum(event["loss"]) for event in positions) == 2 * 5 * 6


@pytest.mark.parametrize("stops", [4, 5])
def test_a_killed_run_that_is_resumed_has_the_same_record(build, stops):
    saving = {"save_strategy": "steps", "save_steps": 2, "ist": IST}
    whole = build("whole", **saving)
    whole.train()
    killed = build("killed", Kill(stops), **saving)
    with pytest.raises(Killed):
        killed.train()
    # a process that dies may leave half a line
    with (Path(killed.args.output_dir) / "report.jsonl").open("a") as stream:
        stream.write('{"kind": "log", "st')
    resumed = build("killed", **saving)
    resumed.train(resume_from_checkpoint=True)

    def told(made):
        events = read_events(Path(made.args.output_dir) / "report.jsonl")
        steady = [
            {key: value for key, value in event.items() if key not in ("entry", "terms", "scores")}
            for event in events
            if event["kind"] != "run"
        ]
        return sorted(json.dumps(event, sort_keys=True) for event in steady)

    assert told(resumed) == told(whole)
    assert [e["step"] for e in record(resumed).logs] == [e["step"] for e in record(whole).logs]
    assert [e.get("loss") for e in record(resumed).logs] == pytest.approx([e.get("loss") for e in record(whole).logs])


def test_a_run_that_begins_anew_forgets_the_last_one(build):
    build("run").train()
    made = build("run")
    made.train()
    assert len([entry for entry in record(made).logs if "loss" in entry]) == 6


@pytest.mark.parametrize("place", [0, 3])
def test_a_stock_trainer_hands_its_callbacks_over(tiny_llama, tmp_path, no_page, place):
    """Before the others, they add figures to a log that it has seen; behind them, they detach before it ends."""
    methods = [SeekCallback(SELECTS), IstCallback(IST), LeanCallback()]
    callbacks = [*methods[:place], ReportCallback(methods), *methods[place:]]
    made = trainer(tiny_llama(), arguments(tmp_path), Trainer, callbacks=callbacks, processing_class=Words())
    made.train()
    found = record(made)
    assert set(found.run["methods"]) == {"seek", "ist", "lean"}
    assert all("seek/selected_share" in entry for entry in found.logs if "loss" in entry)
    assert found.samples[0]["texts"] == [f"<{token}>" for token in found.samples[0]["ids"]]
    assert len(found.visits) == 8 and len(found.draws) == 4


def test_a_plain_run_has_its_log_and_configuration(build):
    made = build("run", seek=None)
    made.train()
    found = record(made)
    assert found.run["methods"] == {}
    assert (found.samples, found.visits, found.positions) == ({}, [], [])
    assert len(found.logs) == len(made.state.log_history)


def test_kept_blocks_and_memory_by_layer_are_recorded_where_a_callback_has_them(build):
    class Handle:
        kept_blocks = [[1, 2], [2, 0]]

    class Method(TrainerCallback):
        handle = Handle()
        layer_mib = {"saved": [2.0, 1.0]}

    made = build("run", Method(), logging_steps=3)
    made.train()
    found = record(made)
    # read at the logs of step 3 and 6, and at the ends of the epochs, which are the same steps
    assert [(grid["step"], grid["values"]) for grid in found.grids] == [(3, [[1, 2], [2, 0]]), (6, [[2, 4], [4, 0]])]
    assert (found.layers[-1]["name"], found.layers[-1]["values"]) == ("saved", [2.0, 1.0])


def test_samples_may_be_few_or_none(build):
    made = build("two", report=ReportCallback(samples=2))
    made.train()
    assert sorted(record(made).samples) == [0, 1]
    made = build("none", report=ReportCallback(samples=0))
    made.train()
    assert record(made).samples == {} and record(made).positions
    with pytest.raises(ValueError, match="`samples` should be 0 .* got -1"):
        ReportCallback(samples=-1)


def test_training_is_the_same_with_a_report(build, tiny_llama, tmp_path, no_page):
    with_report = build("with")
    with_report.train()
    without = trainer(tiny_llama(), arguments(tmp_path / "without", SELECTS, max_steps=6))
    without.train_dataset = examples(6)
    without.train()
    for a, b in zip(with_report.model.parameters(), without.model.parameters(), strict=True):
        assert a.equal(b)


def test_the_page_is_written_when_training_ends_and_after_a_last_evaluation(tiny_llama, tmp_path):
    made = trainer(tiny_llama(), arguments(tmp_path, SELECTS, eval_on_start=True), callbacks=[ReportCallback()])
    made.train()
    first = (tmp_path / "report.html").read_text()
    assert "held-out loss, last" in first
    made.evaluate()
    second = (tmp_path / "report.html").read_text()
    assert second.count("eval") >= first.count("eval") and "held-out loss, first" in second
    assert len([entry for entry in record(made).logs if "eval_loss" in entry]) == 2


def test_a_page_that_cannot_be_written_does_not_end_the_run(build, monkeypatch, caplog):
    def fail(folders, output):
        raise OSError("disk full")

    monkeypatch.setattr(page, "write_page", fail)
    monkeypatch.setattr("hf_tokenseek.callbacks.report.logger.warning", lambda text: caplog.records.append(text))
    made = build("run")
    made.train()
    (said,) = caplog.records
    assert "report.html could not be written (OSError: disk full)" in said
    assert f"hf-tokenseek report {made.args.output_dir}" in said


def test_a_missing_package_is_named_before_training(monkeypatch):
    monkeypatch.setattr("hf_tokenseek.report.find_spec", lambda name: None if name == "matplotlib" else object())
    with pytest.raises(ModuleNotFoundError, match="matplotlib cannot be found.*hf_tokenseek.report.*--report false"):
        ReportCallback()


def test_the_callback_is_light_to_import():
    code = "import sys, hf_tokenseek.callbacks, hf_tokenseek.cli; assert 'matplotlib' not in sys.modules"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
