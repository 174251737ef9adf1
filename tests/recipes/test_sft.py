import json
from dataclasses import asdict

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.records import PYTHON_DOCSTRINGS
from recipes.sft import main, parse_arguments, prepare

QUIET = ["--report_to", "none", "--disable_tqdm", "true", "--use_cpu", "true", "--save_strategy", "no"]


@pytest.fixture
def records(tmp_path):
    """JSONL file with records of both formats."""
    prompts = [f"Which number follows {number}? " * 5 for number in range(24)]
    lines = [{"prompt": prompt, "completion": f"It is {number + 1}."} for number, prompt in enumerate(prompts[:12])]
    for number, prompt in enumerate(prompts[12:], start=12):
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": f"It is {number + 1}."}]
        lines.append({"messages": turns})
    file = tmp_path / "records.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines))
    return file


def test_help_begins_with_examples_and_names_our_options(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    said = capsys.readouterr().out
    assert said.startswith("usage: python recipes/sft.py [--config FILE] [--option VALUE ...]\n\nSupervised")
    assert "    python recipes/sft.py --config recipes/configs/demo_tokenseek.yaml\n" in said
    for option in ("--seek SEEK", "--lean", "--config FILE", "(default: python-docstrings)"):
        assert option in said


def as_dicts(arguments):
    model, data, training = arguments
    return asdict(model), asdict(data), training.to_dict()


def test_yaml_json_and_command_line_give_the_same_configuration(tmp_path):
    options = {
        "model": "some/model",
        "dataset": "records.jsonl",
        "max_length": 77,
        "output_dir": str(tmp_path / "out"),
        "learning_rate": 3e-5,
        "use_cpu": True,
        "use_peft": True,
        "lora_target_modules": ["q_proj", "v_proj"],
        "seek": {"context": 0.2, "score": "recent"},
    }
    as_json, as_yaml = tmp_path / "config.json", tmp_path / "config.yaml"
    as_json.write_text(json.dumps(options))
    as_yaml.write_text(
        "model: some/model\ndataset: records.jsonl\nmax_length: 77\nlearning_rate: 3e-5\n"
        f"use_cpu: true\nuse_peft: true\noutput_dir: {tmp_path / 'out'}\nlora_target_modules: [q_proj, v_proj]\n"
        "seek:\n  context: 0.2\n  score: recent\n"
    )
    command_line = []
    for name, value in options.items():
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else str(value)]
        command_line += [f"--{name}", *values]
    expected = as_dicts(parse_arguments(command_line))
    assert as_dicts(parse_arguments(["--config", str(as_json)])) == expected
    assert as_dicts(parse_arguments(["--config", str(as_yaml)])) == expected


def test_the_command_line_wins_over_the_file(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(f"max_length: 10\neval_examples: 5\nuse_cpu: true\noutput_dir: {tmp_path}\n")
    _, data, _ = parse_arguments(["--max_length", "20", "--config", str(file)])
    assert (data.max_length, data.eval_examples, data.dataset) == (20, 5, PYTHON_DOCSTRINGS)


@pytest.mark.parametrize("value", ["false", "null"])
def test_seek_can_be_switched_off_from_file_and_command_line(tmp_path, value):
    file = tmp_path / "config.yaml"
    file.write_text(f"seek: {value}\nuse_cpu: true\noutput_dir: {tmp_path}\n")
    assert parse_arguments(["--config", str(file)])[-1].seek is None
    assert parse_arguments(["--seek", value, "--use_cpu", "true", "--output_dir", str(tmp_path)])[-1].seek is None


def test_a_bad_configuration_file_is_refused(tmp_path):
    file = tmp_path / "config.yaml"
    with pytest.raises(FileNotFoundError, match="no configuration file"):
        parse_arguments(["--config", str(file)])
    file.write_text("max_lenght: 3\n")
    with pytest.raises(ValueError, match="unknown options.*max_lenght"):
        parse_arguments(["--config", str(file)])
    file.write_text("just text\n")
    with pytest.raises(ValueError, match="must hold `option: value` pairs"):
        parse_arguments(["--config", str(file)])


@pytest.mark.parametrize("seek", ["false", '{"context": 0.2}'])
def test_a_run_trains_evaluates_saves_and_reloads(tmp_path, tiny_model, records, seek):
    output = tmp_path / "out"
    arguments = ["--model", str(tiny_model), "--dataset", str(records), "--eval_examples", "6", "--seek", seek]
    arguments += ["--max_steps", "4", "--learning_rate", "1e-2", "--logging_steps", "1", "--output_dir", str(output)]
    metrics = main([*arguments, "--per_device_train_batch_size", "3", *QUIET])

    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    eval_losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert len(eval_losses) == 2
    assert eval_losses[-1] == metrics["eval_loss"] < eval_losses[0]
    assert len([entry for entry in log if "loss" in entry]) == 4

    before = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    after = AutoModelForCausalLM.from_pretrained(output).state_dict()
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert (
        AutoTokenizer.from_pretrained(output).chat_template == AutoTokenizer.from_pretrained(tiny_model).chat_template
    )


def test_lora_trains_adapters_only(tmp_path, tiny_model, records):
    pytest.importorskip("peft")
    output = tmp_path / "out"
    arguments = ["--model", str(tiny_model), "--dataset", str(records), "--eval_examples", "6", "--max_steps", "2"]
    main([*arguments, "--use_peft", "--lora_r", "2", "--output_dir", str(output), *QUIET])
    assert (output / "adapter_model.safetensors").exists()
    assert not (output / "model.safetensors").exists()


def test_qlora_trains_adapters_on_a_4_bit_base(tmp_path, tiny_model, records):
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    output = tmp_path / "out"
    arguments = ["--model", str(tiny_model), "--dataset", str(records), "--eval_examples", "6", "--max_steps", "2"]
    arguments += ["--use_peft", "--load_in_4bit", "--output_dir", str(output), *QUIET]
    trainer = prepare(arguments)
    weights = {name for name, p in trainer.model.named_parameters() if hasattr(p, "quant_state")}
    assert len(weights) == sum("proj" in name and "lora" not in name for name, _ in trainer.model.named_parameters())
    before = {name: p.clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert all("lora" in name for name in before)
    assert any(not torch.equal(before[name], trainer.model.get_parameter(name)) for name in before)


def test_4_bit_weights_need_adapters():
    with pytest.raises(ValueError, match=r"needs adapters. Add --use_peft"):
        parse_arguments(["--load_in_4bit", "--output_dir", "out"])
