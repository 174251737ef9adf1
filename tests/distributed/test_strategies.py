"""Each strategy on two ranks: it is what was asked for, equals one process, saves and resumes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.launching import RANKS, ROOT, STEPS, launch, needs_compiler

RECIPE = ROOT / "recipes" / "sft.py"
DEEPSPEED = {"distributed_type": "DEEPSPEED", "engine": "DeepSpeedEngine"}
STRATEGIES = {
    "ddp": {"distributed_type": "MULTI_CPU", "engine": "DistributedDataParallel", "sharded": False},
    "fsdp2": {"distributed_type": "FSDP", "engine": "FSDPModule", "sharded": True},
    "zero1": {**DEEPSPEED, "zero_stage": 1, "sharded": False},
    "zero2": {**DEEPSPEED, "zero_stage": 2, "sharded": False},
    "zero3": {**DEEPSPEED, "zero_stage": 3, "sharded": True},
    "zero3_offload": {**DEEPSPEED, "zero_stage": 3, "sharded": True, "offload": ["cpu", "cpu"]},
}


def losses(folder: Path) -> list[float]:
    state = json.loads((folder / "trainer_state.json").read_text())
    return [entry[name] for entry in state["log_history"] for name in ("loss", "eval_loss") if name in entry]


def assert_is(seen: dict, asked: dict) -> None:
    assert seen["world_size"] == RANKS
    assert seen["distributed_type"] == asked["distributed_type"]
    assert asked["engine"] in seen["engine"]
    assert seen["zero_stage"] == asked.get("zero_stage")
    assert seen["offload"] == asked.get("offload", [])
    assert seen["shards"] == (seen["parameters"] if asked["sharded"] else 0)


def assert_same_run(folder: Path, truth: Path) -> list[float]:
    """The same losses and weights; returns the losses."""
    expected = losses(truth)
    assert len(expected) == STEPS + 2
    assert losses(folder) == pytest.approx(expected, rel=1e-5)
    weights, found = load_file(truth / "model.safetensors"), load_file(folder / "model.safetensors")
    assert found.keys() == weights.keys()
    for name in weights:
        torch.testing.assert_close(found[name], weights[name], rtol=1e-4, atol=2e-5)
    return expected


def assert_method_run(strategy: str, config: str, resume: bool, own: tuple, options, one_method_process) -> list[dict]:
    """Two ranks with a method's options equal one process, resumed ones too; returns what the ranks have seen."""
    folder, name = options.folder, f"{strategy}_{config}"
    seen = launch(
        strategy,
        RECIPE,
        options(name, 2, "--save_strategy", "steps" if resume else "no", *own),
        folder / f"{name}_seen",
    )
    for rank in seen:
        assert_is(rank, STRATEGIES[strategy])
    expected = assert_same_run(folder / name, one_method_process(config))
    if resume:
        more = "--resume_from_checkpoint", str(folder / name / "checkpoint-2"), "--save_strategy", "no"
        resumed = options(f"{name}_resumed", 2, *more, *own)
        seen += launch(strategy, RECIPE, resumed, folder / f"{name}_resumed_seen")
        assert losses(folder / f"{name}_resumed")[-2:] == pytest.approx(expected[-2:], rel=1e-5)
    return seen


@pytest.mark.parametrize("strategy", [pytest.param(name, marks=needs_compiler(name)) for name in STRATEGIES])
def test_two_ranks_equal_one_process_and_resume(strategy, options, one_process):
    folder = options.folder
    # lean layers are exact, in tiles too, so the plain layers of the one process are their truth
    whole = options(strategy, 2, "--save_strategy", "steps", "--lean", "true", "--mlp_tiles", "3")
    for seen in launch(strategy, RECIPE, whole, folder / f"{strategy}_seen"):
        assert_is(seen, STRATEGIES[strategy])
    expected = assert_same_run(folder / strategy, one_process)

    checkpoint = folder / strategy / "checkpoint-2"
    resumed = options(f"{strategy}_resumed", 2, "--save_strategy", "no", "--resume_from_checkpoint", str(checkpoint))
    launch(strategy, RECIPE, resumed, folder / f"{strategy}_resumed_seen")
    # what evaluates before the first step has seen the checkpoint already, or not yet
    assert losses(folder / f"{strategy}_resumed")[-2:] == pytest.approx(expected[-2:], rel=1e-5)
