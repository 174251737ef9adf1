"""What the recipe refuses before any compute, and that a killed run goes on as if nothing had happened."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from recipes import checks
from recipes.sft import prepare, run

ROOT = Path(__file__).resolve().parents[2]
STEPS = 6


@pytest.fixture
def options(tmp_path, tiny_model):
    """The command line of a tiny run of six steps with a checkpoint every two."""
    records = [{"prompt": f"Which number follows {n}? " * 4, "completion": f"It is {n + 1}."} for n in range(24)]
    (tmp_path / "records.jsonl").write_text("\n".join(map(json.dumps, records)))

    def build(output: str, *more: str) -> list[str]:
        return [
            *("--model", str(tiny_model), "--dataset", str(tmp_path / "records.jsonl"), "--max_length", "256"),
            *("--output_dir", str(tmp_path / output), "--max_steps", str(STEPS), "--eval_examples", "4"),
            *("--per_device_train_batch_size", "2", "--save_steps", "2", "--save_strategy", "steps"),
            *("--logging_steps", "1", "--report_to", "none", "--disable_tqdm", "true", "--use_cpu", "true"),
            *("--seek", '{"context": 0.3, "temperature": 0.5}', "--learning_rate", "1e-2", *more),
        ]

    return build


def losses(folder: Path) -> list[float]:
    state = json.loads((folder / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def start(arguments: list[str], sitecustomize: Path) -> subprocess.Popen:
    """The recipe in a process of its own, with a module that is imported first."""
    paths = [str(sitecustomize), str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "recipes" / "sft.py"), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


# The process kills itself, as `kill -9` would, at the place named: in the backward pass of the fourth step, or when
# the weights of the second checkpoint are written and its optimizer is not.
IN_A_STEP = """
import os, signal, torch
calls, plain = 0, torch.Tensor.backward
def backward(*args, **kwargs):
    global calls
    calls += 1
    if calls == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(*args, **kwargs)
torch.Tensor.backward = backward
"""
IN_A_SAVE = """
import os, signal, transformers
calls, plain = 0, transformers.Trainer._save_optimizer_and_scheduler
def save(*args, **kwargs):
    global calls
    calls += 1
    if calls == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(*args, **kwargs)
transformers.Trainer._save_optimizer_and_scheduler = save
"""


@pytest.mark.parametrize(("place", "left_behind"), [(IN_A_STEP, ["2"]), (IN_A_SAVE, ["2", "4"])])
def test_a_killed_run_goes_on_with_the_same_losses(options, tmp_path, place, left_behind):
    run(prepare(options("whole")))
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(place)
    process = start(options("killed"), tmp_path / "site")
    assert process.wait() == -signal.SIGKILL, process.stderr.read()
    killed = tmp_path / "killed"
    assert sorted(path.name.removeprefix("checkpoint-") for path in killed.glob("checkpoint-*")) == left_behind

    trainer = prepare(options("killed", "--resume_from_checkpoint", "true"))
    assert trainer.args.resume_from_checkpoint == str(killed / "checkpoint-2")
    run(trainer)
    assert len(losses(killed)) == STEPS
    assert losses(killed) == losses(tmp_path / "whole")


def test_a_run_is_not_overwritten(options, tmp_path):
    run(prepare(options("out")))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    with pytest.raises(FileExistsError, match="already holds a run.*--resume_from_checkpoint true"):
        prepare(options("out"))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "trainer_state.json").unlink(), "has no trainer_state.json"),
        (lambda folder: (folder / "trainer_state.json").write_text('{"glob'), "broken trainer_state.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
        (shutil.rmtree, "is no folder"),
    ],
)
def test_a_corrupt_checkpoint(tmp_path, damage, message):
    folder = tmp_path / "out" / "checkpoint-3"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text("")
    (folder / "trainer_state.json").write_text('{"global_step": 3}')
    arguments = SimpleNamespace(resume_from_checkpoint=str(folder), output_dir=str(tmp_path / "out"))
    assert checks.checkpoint_to_resume(arguments) == str(folder)
    damage(folder)
    with pytest.raises(FileNotFoundError, match=message):
        checks.checkpoint_to_resume(arguments)
    arguments.resume_from_checkpoint = "true"
    with pytest.raises(FileNotFoundError, match="no whole checkpoint"):
        checks.checkpoint_to_resume(arguments)


def test_checkpoints_are_ordered_by_number(tmp_path):
    for step in (9, 10, 2):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.safetensors").write_text("")
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    arguments = SimpleNamespace(resume_from_checkpoint="true", output_dir=str(tmp_path))
    assert checks.checkpoint_to_resume(arguments) == str(tmp_path / "checkpoint-10")


def test_a_full_disk_is_seen_before_training(options, monkeypatch):
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match="0.00 GiB free, saving takes up to .* GiB"):
        prepare(options("out"))


def test_sequences_longer_than_the_model(options):
    with pytest.raises(ValueError, match="max_length=3000 is more than the 2048 positions of LlamaForCausalLM"):
        prepare(options("out", "--max_length", "3000"))


def test_data_without_records_or_labels():
    with pytest.raises(ValueError, match="training data set is empty"):
        checks.check_records([], "training")
    with pytest.raises(ValueError, match="No token of the evaluation data set has a label"):
        checks.check_records([{"input_ids": [1, 2], "labels": [-100, -100]}], "evaluation")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--seek", '{"contxt": 0.1}'], "contxt"),
        (["--seek", '{"ratio": 1.5}'], "1.5"),
        (["--seek", '{"ratio": 0}'], "ratio"),
        (["--dataset", "missing.jsonl"], "no data file 'missing.jsonl'"),
        (["--resume_from_checkpoint", "nowhere"], "'nowhere' is no folder"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_clear_line(options, tmp_path, more, message):
    process = start(options("out", *more), tmp_path)
    _, errors = process.communicate()
    assert process.returncode == 1
    [line] = [line for line in errors.splitlines() if line.startswith("sft.py: error: ")]
    assert message in line and "Traceback" not in errors
    assert not (tmp_path / "out").exists()
