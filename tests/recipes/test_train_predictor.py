"""A predictor's training learns, saves what LeMo loads, goes on after an interruption, refuses before any compute."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_tokenseek import LemoConfig, attach
from hf_tokenseek.lemo.predictor import SHAPES, WEIGHTS, Predictor
from recipes import predictor_state, train_predictor
from recipes.predictor_state import parameters_of, table
from recipes.python_docstrings import read_source
from recipes.train_predictor import CHECKPOINT, FIGURES, parse_arguments, prepare

ROOT = Path(__file__).resolve().parents[2]
FILES = {"train": ("json.decoder", "argparse"), "test": ("textwrap",)}


@pytest.fixture
def options(tiny_model, tmp_path, monkeypatch):
    """The command line of a tiny training of eight updates, three of which remove units."""
    texts = {
        split: [read_source(Path(importlib.import_module(name).__file__)) for name in names]
        for split, names in FILES.items()
    }
    monkeypatch.setattr(train_predictor, "source_files", texts.__getitem__)

    def build(output: str, *more: str) -> list[str]:
        return [
            *(
                "--model",
                str(tiny_model),
                "--output_dir",
                str(tmp_path / output),
                "--seq_length",
                "64",
                "--block",
                "4",
            ),
            *("--hidden", "12", "16", "--dim", "8", "--steps", "8", "--batch_size", "2", "--learning_rate", "1e-2"),
            *("--eval_sequences", "3", "--save_steps", "3", "--disable_tqdm", "true", *more),
        ]

    return build


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def test_a_training_learns_and_saves_what_lemo_loads(options, tiny_model, tmp_path, capsys):
    figures = prepare(options("out", "--steps", "40", "--queries", "all", "--keep", "0.5"))()
    assert sum(figures["after"]) > sum(figures["before"]) and sum(figures["after"]) > sum(figures["random"])
    # int(0.5 * 16) of 16 blocks
    assert figures["random"] == [0.5, 0.5] and len(figures["pooled"]) == len(figures["place"]) == 2
    before, after = figures["parameters"]
    assert after < before == 4 * (32 * 12 + 12 + 12 * 16 + 16 + 16 * 8 + 8)
    assert table(figures) in capsys.readouterr().out

    output = tmp_path / "out"
    stored = json.loads((output / FIGURES).read_text())
    assert stored.pop("options")["steps"] == 40 and stored == figures
    assert sorted(path.name for path in output.iterdir()) == sorted([WEIGHTS, SHAPES, FIGURES])
    model = AutoModelForCausalLM.from_pretrained(tiny_model).train()
    config = LemoConfig(score="predictor", predictor=str(output), block=4, queries="all", dense_first=0)
    assert parameters_of(Predictor.load(output, model, config)) == after
    ids = torch.arange(5, 69)[None]
    with attach(model, lemo=config) as handle:
        model(input_ids=ids, labels=ids).loss.backward()
        assert set(handle.lemo.elimination.kept) == {0, 1}


@pytest.mark.parametrize("killed", [1, 4, 7])
def test_a_resumed_training_gives_the_same_predictor(options, tmp_path, monkeypatch, killed):
    whole = prepare(options("whole"))()
    train_step, done = predictor_state.train_step, []

    def interrupted(*args):
        if len(done) == killed:
            raise KeyboardInterrupt
        done.append(None)
        return train_step(*args)

    monkeypatch.setattr(predictor_state, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(options("again"))()
    assert (tmp_path / "again" / CHECKPOINT).exists() == (killed >= 3)
    assert not (tmp_path / "again" / WEIGHTS).exists()
    done[:] = [None] * (killed + 1)
    again = prepare(options("again"))()
    # it went on from the last multiple of three
    assert len(done) - killed - 1 == 8 - killed // 3 * 3
    assert again == whole
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "again")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_interrupted_while_it_is_judged_it_does_not_train_again(options, tmp_path, monkeypatch):
    judge = train_predictor.judge
    monkeypatch.setattr(train_predictor, "judge", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(options("out"))()
    monkeypatch.setattr(train_predictor, "judge", judge)
    monkeypatch.setattr(predictor_state, "train_step", lambda *_: 1 / 0)
    assert prepare(options("out"))()["parameters"]


def test_nothing_is_overwritten(options, tmp_path):
    prepare(options("out"))()
    with pytest.raises(FileExistsError, match="out' already holds a predictor.*another --output_dir, or remove lemo"):
        prepare(options("out"))
    begun = prepare(options("half"))
    (tmp_path / "half").mkdir()
    state = predictor_state.PredictorState(begun._fresh(), 8, 1e-2)
    state.save(tmp_path / "half" / CHECKPOINT, begun.arguments.identity())
    with pytest.raises(FileExistsError, match=r"interrupted training that was begun with {'steps': 8}. Give the same"):
        prepare(options("half", "--steps", "9"))
    # how often it saves is nobody's business
    prepare(options("half", "--save_steps", "1"))


def test_the_seed_draws_weights_and_order(options, tmp_path):
    for output, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        prepare(options(output, "--seed", seed, "--prune_steps", "0", "--steps", "2"))()
    a, b, c = (weights(tmp_path / output) for output in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not any(torch.equal(a[name], c[name]) for name in a)


def test_units_are_removed_behind_the_steps_that_are_named(options, monkeypatch):
    assert parse_arguments(["--output_dir", "out", "--steps", "400"]).pruning() == {100: 0.8, 200: 0.75, 300: 0.7}
    pruned = []
    prune = predictor_state.ZeroCounter.prune

    def seen(counter, optimizer, share):
        pruned.append((int(optimizer.state[optimizer.param_groups[0]["params"][0]]["step"]), share))
        return prune(counter, optimizer, share)

    monkeypatch.setattr(predictor_state.ZeroCounter, "prune", seen)
    figures = prepare(options("some", "--prune_steps", "2", "5", "--prune_shares", "0.9", "0.5"))()
    assert pruned == [(2, 0.9), (5, 0.5)] and figures["parameters"][1] < figures["parameters"][0]
    pruned.clear()
    figures = prepare(options("none", "--prune_steps", "0"))()
    assert pruned == [] and figures["parameters"][1] == figures["parameters"][0]


def test_records_bring_their_labels(options, tmp_path):
    records = tmp_path / "records.jsonl"
    lines = [{"prompt": f"Which number follows {n}? " * 3, "completion": f"It is {n + 1}."} for n in range(12)]
    records.write_text("\n".join(json.dumps(line) for line in lines))
    run = prepare(options("out", "--dataset", str(records), "--seq_length", "100"))
    assert (len(run.training), len(run.evaluation)) == (9, 3)
    assert all(-100 in item["labels"] and len(item["input_ids"]) <= 100 for item in run.training)
    assert run()["after"]


def test_held_out_text_is_not_trained_on(options):
    run = prepare(options("out"))
    training = {tuple(item["input_ids"]) for item in run.training}
    assert training.isdisjoint(tuple(item["input_ids"]) for item in run.evaluation) and len(run.evaluation) == 3


def test_help_begins_with_examples_and_names_the_options(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    said = capsys.readouterr().out
    assert said.startswith(
        "usage: python recipes/train_predictor.py [--config FILE] [--option VALUE ...]\n\nTrains LeM"
    )
    for option in ("--prune_steps PRUNE_STEPS", "--hidden HIDDEN", "(default: smollm2)"):
        assert option in " ".join(said.split())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--steps", "0"], "steps=0 should be at least 1"),
        (["--batch_size", "0"], "batch_size=0 should be at least 1"),
        (["--hidden", "8"], r"hidden=\[8\] should be the sizes of two hidden states, as --hidden 64 256"),
        (["--learning_rate", "0"], "learning_rate=0.0 should be above 0"),
        (["--seq_length", "7"], "seq_length=7 has no two blocks of block=4.*--seq_length 8 or more"),
        (["--queries", "past"], "`queries` should be one of .*'labelled'"),
        (["--block", "0"], "`block` should be at least 1"),
        (["--keep", "0"], r"`keep` should be a share in \(0, 1\]"),
        (["--prune_steps", "1", "2"], r"prune_shares=\[0.8, 0.75, 0.7\] should be 2 shares.*prune_steps=\[1, 2\]"),
        (["--prune_shares", "0.8", "0.7", "1.5"], r"should be 3 shares in \(0, 1\]"),
        (["--seq_length", "4000"], "seq_length=4000 is more than the 2048 positions.*Set --seq_length 2048 or less"),
        (["--eval_sequences", "100000"], "too little text: .* of eval_sequences=100000 to evaluate on"),
        (["--dataset", "none.jsonl"], "There is no data file 'none.jsonl'"),
    ],
)
def test_what_cannot_work_is_refused(options, tmp_path, more, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prepare(options("out", *more))
    assert not (tmp_path / "out").exists()


def test_a_mistake_on_the_command_line_is_one_clear_line(tmp_path):
    command = [sys.executable, str(ROOT / "recipes" / "train_predictor.py"), "--queries", "past"]
    process = subprocess.run([*command, "--output_dir", str(tmp_path / "out")], capture_output=True, text=True)
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1].startswith("train_predictor.py: error: `queries` should be one of")
    assert "Traceback" not in process.stderr and not (tmp_path / "out").exists()
