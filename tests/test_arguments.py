"""`TokenSeekArguments`: one config from YAML, JSON, the command line and code, and what trainers do with it."""

import dataclasses
import json
import pickle

import pytest
import torch
from transformers import HfArgumentParser, TrainingArguments

from hf_tokenseek import SeekConfig, TokenSeekArguments


def parse_yaml(folder, text: str) -> TokenSeekArguments:
    path = folder / "arguments.yaml"
    path.write_text(f"output_dir: out\n{text}")
    return HfArgumentParser(TokenSeekArguments).parse_yaml_file(str(path))[0]


def parse_json(folder, fields: dict) -> TokenSeekArguments:
    path = folder / "arguments.json"
    path.write_text(json.dumps({"output_dir": "out", **fields}))
    return HfArgumentParser(TokenSeekArguments).parse_json_file(str(path))[0]


def parse_line(*words: str) -> TokenSeekArguments:
    return HfArgumentParser(TokenSeekArguments).parse_args_into_dataclasses(["--output_dir", "out", *words])[0]


@pytest.mark.parametrize(
    "yaml, fields, words, expected",
    [
        ("", {}, (), SeekConfig()),
        ("seek: true", {"seek": True}, ("--seek", "true"), SeekConfig()),
        ("seek: {}", {"seek": {}}, ("--seek", "{}"), SeekConfig()),
        ("seek: false", {"seek": False}, ("--seek", "false"), None),
        ("seek: null", {"seek": None}, ("--seek", "none"), None),
        ("seek: {context: 0.2}", {"seek": {"context": 0.2}}, ("--seek", '{"context": 0.2}'), SeekConfig(context=0.2)),
        (
            "seek:\n  ratio: 0.5\n  score: random\n  seed: 3",
            {"seek": {"ratio": 0.5, "score": "random", "seed": 3}},
            ("--seek", '{"ratio": 0.5, "score": "random", "seed": 3}'),
            SeekConfig(ratio=0.5, score="random", seed=3),
        ),
        (
            "seek: '{\"context\": 0.2}'",
            {"seek": '{"context": 0.2}'},
            ('--seek={"context": 0.2}',),
            SeekConfig(context=0.2),
        ),
    ],
)
def test_yaml_json_line_and_code_mean_the_same(tmp_path, yaml, fields, words, expected):
    found = [parse_yaml(tmp_path, yaml), parse_json(tmp_path, fields), parse_line(*words)]
    code = TokenSeekArguments(output_dir="out", **({} if "seek" not in fields else {"seek": expected}))
    for arguments in (*found, code):
        assert arguments.seek == expected
    # all other fields are those of TrainingArguments
    own, plain = found[0].to_dict(), TrainingArguments(output_dir="out").to_dict()
    assert own.pop("seek") == (None if expected is None else dataclasses.asdict(expected)) and own.pop("lean") is False
    assert own.pop("velora") is None and own.pop("ist") is None and own.pop("lemo") is None
    assert own.pop("mlp_tiles") == 1
    assert {k: v for k, v in own.items() if k != "logging_dir"} == {
        k: v for k, v in plain.items() if k != "logging_dir"
    }


def test_empty_braces_are_the_defaults_in_code():
    assert TokenSeekArguments(output_dir="out", seek={}).seek == SeekConfig()


@pytest.mark.parametrize("value", ['{"contxt": 0.2}', {"contxt": 0.2}])
def test_unknown_field_names_what_is_allowed(value):
    with pytest.raises(
        ValueError, match=r"`seek` has unknown fields \['contxt'\]. Allowed: \['context', 'labelled', "
    ):
        TokenSeekArguments(output_dir="out", seek=value)


@pytest.mark.parametrize("value, said", [("yes please", "JSON such as"), (3, "got int"), ("[1]", "got list")])
def test_value_of_another_kind_says_what_is_expected(value, said):
    with pytest.raises(ValueError, match=f"`seek` should be .*{said}"):
        TokenSeekArguments(output_dir="out", seek=value)


@pytest.mark.parametrize("seek", [SeekConfig(context=0.2, score="recent"), None])
def test_arguments_survive_what_trainers_do_with_them(tmp_path, seek):
    arguments = TokenSeekArguments(output_dir="out", seek=seek, learning_rate=3e-4)
    expected = None if seek is None else dataclasses.asdict(seek)
    assert json.loads(arguments.to_json_string())["seek"] == expected
    # trackers log these: plain types only
    assert {type(v) for v in arguments.to_sanitized_dict().values()} <= {bool, int, float, str, torch.Tensor}
    torch.save(arguments, tmp_path / "training_args.bin")
    for copy in (
        pickle.loads(pickle.dumps(arguments)),
        torch.load(tmp_path / "training_args.bin", weights_only=False),
        dataclasses.replace(arguments),
        TokenSeekArguments(**{"output_dir": "out", "learning_rate": 3e-4, "seek": arguments.to_dict()["seek"]}),
    ):
        assert copy.seek == seek and copy.learning_rate == 3e-4
    assert dataclasses.replace(arguments, seek={"context": 0.5}).seek == SeekConfig(context=0.5)
    assert f"seek={expected}" in str(arguments)
    path = tmp_path / "arguments.json"
    path.write_text(arguments.to_json_string())
    assert json.loads(path.read_text())["seek"] == expected
