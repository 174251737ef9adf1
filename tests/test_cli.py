import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hf_tokenseek.cli import main
from hf_tokenseek.memory.command import load_config, parse_method
from tests.seek.tiny_families import tiny_config


@pytest.fixture
def model(tmp_path):
    """The config.json of a tiny model."""
    config = tiny_config("llama")
    config.use_cache = False
    config.save_pretrained(tmp_path)
    return str(tmp_path / "config.json")


def run(capsys, *argv):
    status = main(argv)
    return status, capsys.readouterr()


def test_help_answers_without_torch():
    code = "import sys; import hf_tokenseek.cli as c\ntry: c.main(['estimate', '--help'])\nexcept SystemExit: pass\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}assert 'torch' not in sys.modules"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "--seq" in done.stdout


def test_estimate_prints_phases_kinds_and_what_is_left_out(capsys, model):
    arguments = ["--model", model, "--seq", "64", "--batch", "2", "--device", "cpu"]
    status, printed = run(capsys, "estimate", *arguments, "--method", 'seek={"context": 0.2}', "--method", "lean")
    assert status == 0
    for word in ("parameters", "temporaries", "scout", "backward", "not modelled", "closed form", "labelled", "lean"):
        assert word in printed.out
    assert "2 x 64 tokens, the last 4 of each sequence labelled" in printed.out


def test_estimate_as_json_and_exit_status(capsys, model):
    arguments = ["--model", model, "--seq", "64", "--device", "cpu", "--checkpointing", "--json"]
    status, printed = run(capsys, "estimate", *arguments)
    found = json.loads(printed.out)
    assert status == 0 and found["fits"] is None and found["training"]["checkpointing"]
    assert found["peak_bytes"] == max(phase["bytes"] for phase in found["phases"].values())
    assert run(capsys, "estimate", *arguments, "--gpu", "1GiB")[0] == 0
    status, printed = run(capsys, "estimate", *arguments, "--gpu", "0.1MiB")
    assert status == 1 and json.loads(printed.out)["fits"] is False


def test_a_large_model_needs_no_memory_here(capsys):
    file = Path(__file__).parents[1] / "recipes" / "configs" / "llama_3_1_8b.json"
    status, printed = run(capsys, "estimate", "--model", str(file), "--seq", "32768", "--gpu", "80GiB", "--json")
    found = json.loads(printed.out)
    assert status == 1 and found["parameters"] == 8_030_261_248
    assert found["saved_bytes"] == pytest.approx(found["saved_formula_bytes"], rel=1e-3)
    assert found["peak_bytes"] > 250 * 2**30


def test_fit_prints_a_configuration(capsys, model):
    arguments = ["--model", model, "--seq", "64", "--device", "cpu"]
    status, printed = run(capsys, "fit", *arguments, "--gpu", "1GiB")
    assert status == 0
    # the whole output is YAML: what was tried stands in comments
    assert yaml.safe_load(printed.out)["seek"] is False and printed.out.startswith("# plain")
    status, printed = run(capsys, "fit", *arguments, "--gpu", "0.1MiB")
    assert status == 1 and "Nothing fits into" in printed.out and yaml.safe_load(printed.out) is None
    status, printed = run(capsys, "fit", *arguments, "--gpu", "1GiB", "--json")
    found = json.loads(printed.out)
    assert status == 0 and found["tried"][-1]["fits"] and found["options"]["max_length"] == 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--model": "no/such-model"}, "Pass a name of the hub, a folder that holds a config.json, or that file"),
        ({"--seq": "9999"}, "9999 is more than the 256 positions"),
        ({"--gpu": "24"}, "such as 24GiB, got '24'"),
        ({"--optimizer": "adamw"}, "`optimizer` should be one of"),
        ({"--dtype": "fp8"}, "`dtype` should be one of"),
        ({"--ranks": "2"}, "at least 2 `ranks`"),
        ({"--method": "sek"}, "unknown names"),
        ({"--method": "seek={context: 1}"}, "NAME or NAME=JSON"),
        ({"--method": 'seek={"contxt": 1}'}, "unknown fields"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line_and_exit_status_2(capsys, model, change, message):
    given = {"--model": model, "--seq": "64", "--device": "cpu", "--gpu": "1GiB", **change}
    status, printed = run(capsys, "estimate", *(word for pair in given.items() for word in pair))
    assert status == 2
    assert message in printed.err and printed.err.startswith("hf-tokenseek: error:")
    assert printed.err.count("\n") == 1


def test_configurations_from_folders_and_files(tmp_path, model):
    assert load_config(model).vocab_size == load_config(str(tmp_path)).vocab_size
    other = tmp_path / "other.json"
    other.write_text('{"model_type": "nothing"}')
    with pytest.raises(ValueError, match="`model_type` that transformers knows, got 'nothing'"):
        load_config(str(other))


def test_methods():
    assert parse_method("lean") == ("lean", True)
    assert parse_method('seek={"context": 0.1}') == ("seek", {"context": 0.1})
    assert parse_method("seek=false") == ("seek", False)
