import json

import pytest

from hf_tokenseek.report.record import RecordFile, read_events, read_run
from tests.report.records import EVIL, TEXTS, events, write


def test_events_come_back_by_kind(tmp_path):
    run = read_run(write(tmp_path / "some run"))
    assert run.name == "some run"
    assert run.run["arguments"]["run_name"] == EVIL
    assert [entry["step"] for entry in run.logs] == [0, 1, 2, 3, 4, 4]
    assert run.samples[0]["texts"] == TEXTS
    assert [visit["step"] for visit in run.visits] == [1, 2, 3, 4]
    assert (len(run.positions), len(run.draws), len(run.grids), len(run.layers)) == (2, 3, 1, 1)


def test_what_is_appended_stands_behind_what_was_there(tmp_path):
    file = RecordFile(tmp_path / "new" / "folder")
    file.begin([{"kind": "run", "step": 0}])
    file.append([])
    file.append([{"kind": "log", "step": 1}, {"kind": "log", "step": 2}])
    file.append([{"kind": "log", "step": 3}])
    assert [event["step"] for event in read_events(file.file)] == [0, 1, 2, 3]
    file.begin([{"kind": "run", "step": 0}])
    assert len(read_events(file.file)) == 1
    assert [path.name for path in file.file.parent.iterdir()] == ["report.jsonl"]


def test_values_are_stored_as_strict_json(tmp_path):
    file = RecordFile(tmp_path)
    stored = {
        "kind": "log",
        "values": [float("nan"), float("inf"), 1 / 3, 7, True, None, "\u2028 é"],
        "path": tmp_path,
    }
    file.begin([stored])
    text = file.file.read_text()
    assert len(text.splitlines()) == 1
    (event,) = (json.loads(line, parse_constant=pytest.fail) for line in text.splitlines())
    assert event["values"] == [None, None, 0.33333, 7, True, None, "\u2028 é"]
    assert event["path"] == str(tmp_path)


def test_a_resumed_run_keeps_what_came_before_its_checkpoint(tmp_path):
    write(tmp_path)
    kept = RecordFile(tmp_path).read_until(2)
    assert {event["kind"] for event in kept} == {"sample", "visit", "positions", "draw"}
    assert max(event["step"] for event in kept) == 2
    assert RecordFile(tmp_path / "elsewhere").read_until(2) == []


def test_a_line_that_was_not_written_to_its_end_is_passed_over(tmp_path):
    file = write(tmp_path) / "report.jsonl"
    whole = file.read_text()
    file.write_text(whole[:-20])
    assert read_events(file) == events()[:-1]
    lines = whole.splitlines()
    file.write_text("\n".join([lines[0], lines[1][:10], *lines[2:]]))
    with pytest.raises(ValueError, match="Line 2 of .*report.jsonl' is no JSON .* Remove it"):
        read_events(file)


def test_without_a_record_the_trainers_log_is_read(tmp_path):
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": [{"loss": 1.0, "step": 1}]}))
    run = read_run(tmp_path, "plain")
    assert (run.name, run.logs, run.run, run.visits) == ("plain", [{"loss": 1.0, "step": 1}], {}, [])
    with pytest.raises(
        FileNotFoundError, match="neither report.jsonl .* nor trainer_state.json .* Name the output_dir"
    ):
        read_run(tmp_path / "nothing")
