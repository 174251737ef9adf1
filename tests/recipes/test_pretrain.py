"""Pre-training learns, holds out whole modules, saves what reloads, resumes, and refuses before any compute."""

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes import pretrain
from recipes.pretrain import main, parse_arguments, prepare, run
from recipes.python_docstrings import SPLITS, read_source, standard_library, top_level
from recipes.source_text import SMALLEST_VOCABULARY, cut, source_files, train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
STEPS = 6
LOW_RANK = ["--optim_target_modules", ".*(attn|mlp).*", "--optim_args", "rank=4,update_proj_gap=2"]
METHODS = {
    "full": [],
    "velora": ["--velora", '{"groups": 4}'],
    "galore": ["--optim", "galore_adamw", *LOW_RANK],
    "apollo": ["--optim", "apollo_adamw", *LOW_RANK],
}
NEEDS = {"galore": "galore_torch", "apollo": "apollo_torch"}
FILES = {
    "train": ("json.decoder", "json.encoder", "json.scanner", "argparse"),
    "validation": ("csv",),
    "test": ("textwrap",),
}


@pytest.fixture
def few_files(monkeypatch):
    """A few of the files, so that a run starts at once."""
    texts = {
        split: [read_source(Path(importlib.import_module(name).__file__)) for name in names]
        for split, names in FILES.items()
    }
    monkeypatch.setattr(pretrain, "source_files", texts.__getitem__)
    return texts


@pytest.fixture
def options(few_files, tmp_path):
    """The command line of a tiny run of six steps with a checkpoint every two."""

    def build(output: str, *more: str) -> list[str]:
        return [
            *("--hidden_size", "32", "--intermediate_size", "80", "--num_hidden_layers", "2"),
            *("--num_attention_heads", "4", "--vocab_size", "400", "--seq_length", "32", "--eval_sequences", "8"),
            *("--output_dir", str(tmp_path / output), "--max_steps", str(STEPS), "--learning_rate", "1e-2"),
            *("--per_device_train_batch_size", "4", "--save_steps", "2", "--save_strategy", "steps"),
            *("--logging_steps", "1", "--report_to", "none", "--disable_tqdm", "true", "--use_cpu", "true", *more),
        ]

    return build


def logged(folder: Path, key: str) -> list[float]:
    state = json.loads((folder / "trainer_state.json").read_text())
    return [entry[key] for entry in state["log_history"] if key in entry]


def test_no_module_is_in_two_splits():
    # files without code to speak of occur in many modules
    splits = {file: split for split in SPLITS for file in source_files(split) if len(file) > 500}
    found = {}
    for name, path in standard_library():
        if (split := splits.get(read_source(path))) is not None:
            found.setdefault(top_level(name), set()).add(split)
    assert all(len(of_module) == 1 for of_module in found.values())
    assert {split for [split] in found.values()} == set(SPLITS)


def test_sequences_are_the_text_with_every_token_labelled(few_files):
    files = few_files["train"]
    tokenizer = train_tokenizer(files, 400)
    assert len(tokenizer) == 400
    sequences = cut(files, tokenizer, 32)
    assert {len(sequence["input_ids"]) for sequence in sequences} == {32}
    assert all(sequence["labels"] == sequence["input_ids"] for sequence in sequences)
    text = tokenizer.decode([token for sequence in sequences for token in sequence["input_ids"]])
    whole = "".join(file + tokenizer.eos_token for file in files)
    # the end is shorter than a sequence
    assert whole.startswith(text) and len(tokenizer(whole[len(text) :])["input_ids"]) < 32


def test_the_same_text_gives_the_same_tokenizer(few_files):
    first, second = (train_tokenizer(few_files["train"], 400) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()


def test_held_out_text_is_not_trained_on(options):
    trainer = prepare(options("out"))
    training = {tuple(sequence["input_ids"]) for sequence in trainer.train_dataset}
    assert training.isdisjoint(tuple(sequence["input_ids"]) for sequence in trainer.eval_dataset)
    assert [item["input_ids"] for item in prepare(options("out", "--seed", "1")).eval_dataset] == [
        item["input_ids"] for item in trainer.eval_dataset
    ]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_learns_saves_and_reloads(options, tmp_path, method):
    if method in NEEDS:
        pytest.importorskip(NEEDS[method])
    output = tmp_path / "out"
    trainer = prepare(options("out", *METHODS[method], "--max_steps", "20", "--save_strategy", "no"))
    metrics = run(trainer)

    before, after = logged(output, "eval_loss")
    assert before == pytest.approx(math.log(400), rel=0.05)
    assert after == metrics["eval_loss"] < before - 0.5
    assert logged(output, "eval_perplexity") == pytest.approx([math.exp(before), math.exp(after)])

    model = AutoModelForCausalLM.from_pretrained(output)
    ids = torch.tensor([sequence["input_ids"] for sequence in trainer.eval_dataset])
    with torch.no_grad():
        assert float(model(input_ids=ids, labels=ids).loss) == pytest.approx(after, rel=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.decode(tokenizer("def f(x):\n    return 'ä'")["input_ids"]) == "def f(x):\n    return 'ä'"


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(options, tmp_path, method):
    if method in NEEDS:
        pytest.importorskip(NEEDS[method])
    main(options("whole", *METHODS[method]))
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    again = prepare(options("again", *METHODS[method], "--resume_from_checkpoint", str(checkpoint)))
    run(again)
    assert again.state.global_step == STEPS
    assert len(logged(tmp_path / "again", "loss")) == STEPS
    assert logged(tmp_path / "again", "loss") == logged(tmp_path / "whole", "loss")
    assert logged(tmp_path / "again", "eval_loss")[-1] == logged(tmp_path / "whole", "eval_loss")[-1]


def test_velora_keeps_less_for_backward(options, tmp_path):
    for method in ("full", "velora"):
        main(options(method, *METHODS[method], "--max_steps", "2", "--save_strategy", "no"))
    full, velora = (logged(tmp_path / method, "memory/saved_activations_mib")[-1] for method in ("full", "velora"))
    # 128 tokens, two layers, of each input of 32, 32 and 80 numbers 4 are kept
    assert full - velora == pytest.approx(128 * 2 * (32 + 32 + 80 - 3 * 4) * 4 / 2**20, rel=0.1)


def test_the_seed_draws_weights_and_order(options, tmp_path):
    for output, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        main(options(output, "--seed", seed, "--max_steps", "2", "--save_strategy", "no"))
    assert logged(tmp_path / "a", "loss") == logged(tmp_path / "b", "loss") != logged(tmp_path / "c", "loss")


def test_presets_and_token_selection(options):
    model, text, training = parse_arguments(["--output_dir", "out", "--use_cpu", "true"])
    assert (model.preset, text.vocab_size, text.seq_length, training.seek) == ("llama-8m", 4096, 256, None)
    config = prepare(options("out", "--preset", "llama-60m", "--intermediate_size", "8")).model.config
    # the command line of the tiny run goes before the preset
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (32, 8, 2)
    assert pretrain.llama_shapes("llama-60m") == {
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
    }


def test_the_configuration_file_is_read():
    file = ROOT / "recipes" / "configs" / "pretrain_velora.yaml"
    model, text, training = parse_arguments(["--config", str(file), "--use_cpu", "true"])
    assert (model.preset, text.seq_length, training.seek, training.velora.groups) == ("llama-8m", 256, None, 32)


def test_help_begins_with_examples_and_names_the_options(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    said = capsys.readouterr().out
    assert said.startswith("usage: python recipes/pretrain.py [--config FILE] [--option VALUE ...]\n\nPre-training")
    for option in ("--preset PRESET", "--velora VELORA", "(default: llama-8m)"):
        assert option in " ".join(said.split())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--num_attention_heads", "5"], r"num_attention_heads=5 does not divide hidden_size=32.*one of \[1, 2, 4, 8"),
        (["--num_attention_heads", "32"], "heads of an even width"),
        (["--hidden_size", "33"], "Choose an even hidden_size"),
        (["--num_hidden_layers", "0"], "num_hidden_layers=0 should be at least 1"),
        (["--preset", "gpt"], "Unknown preset 'gpt'. Choose one of llama-8m, llama-60m"),
        (["--vocab_size", "256"], f"no room for the 256 bytes.*--vocab_size {SMALLEST_VOCABULARY} or more"),
        (["--vocab_size", "100000"], r"too short for vocab_size=100000: it gives \d+ tokens"),
        (["--seq_length", "1"], "seq_length=1 should be at least 2"),
        (["--seq_length", "1000000"], "too little text: 0 sequences of seq_length=1000000 to train on"),
        (["--eval_sequences", "100000"], "too little text: .* of eval_sequences=100000 to evaluate on"),
        (["--eval_sequences", "0"], "eval_sequences=0 at least 1"),
        (["--eval_split", "train"], "eval_split='train' should be one of validation, test"),
    ],
)
def test_what_cannot_work_is_refused(options, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        prepare(options("out", *more))
    assert not (tmp_path / "out").exists()


def test_a_run_is_not_overwritten(options):
    main(options("out", "--max_steps", "1"))
    with pytest.raises(FileExistsError, match="already holds a run.*--resume_from_checkpoint true"):
        prepare(options("out"))


def test_a_mistake_on_the_command_line_is_one_clear_line(tmp_path):
    command = [sys.executable, str(ROOT / "recipes" / "pretrain.py"), "--use_cpu", "true"]
    command += ["--output_dir", str(tmp_path / "out"), "--eval_split", "train"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1].startswith("pretrain.py: error: eval_split='train'")
    assert "Traceback" not in process.stderr and not (tmp_path / "out").exists()
