import pytest

from recipes.records import PYTHON_DOCSTRINGS, hold_out, load_records, read_jsonl


def test_jsonl_skips_empty_lines_and_keeps_line_separators_inside_strings(tmp_path):
    file = tmp_path / "records.jsonl"
    file.write_text('{"prompt": "a\u2028b", "completion": "c"}\n\n{"messages": []}\n', encoding="utf-8")
    expected = [{"prompt": "a\u2028b", "completion": "c"}, {"messages": []}]
    assert read_jsonl(file) == expected
    assert load_records(str(file)) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [("{}\n{oops\n", "Line 2 of .* is not JSON"), ("[1]\n", "Line 1 of .* no JSON object"), ("\n", "no records")],
)
def test_bad_jsonl_is_refused_with_its_line(tmp_path, content, message):
    file = tmp_path / "records.jsonl"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_records(str(file))


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"no data file 'nowhere\.jsonl'"):
        load_records("nowhere.jsonl")


def test_an_unknown_split_of_the_built_in_task_is_refused():
    with pytest.raises(ValueError, match="Unknown split 'dev'.*train, validation, test"):
        load_records(PYTHON_DOCSTRINGS, "dev")


def test_hold_out_parts_the_records_and_repeats():
    records = [{"prompt": str(i), "completion": "x"} for i in range(20)]
    training, evaluation = hold_out(records, 5, seed=3)
    assert len(evaluation) == 5
    assert sorted(int(record["prompt"]) for record in training + evaluation) == list(range(20))
    assert hold_out(records, 5, seed=3) == (training, evaluation)
    assert hold_out(records, 5, seed=4) != (training, evaluation)


@pytest.mark.parametrize("count", [0, 20, 21])
def test_hold_out_leaves_something_on_both_sides(count):
    with pytest.raises(ValueError, match=f"Cannot hold out {count} of 20"):
        hold_out([{}] * 20, count)
