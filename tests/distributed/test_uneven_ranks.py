"""Ranks that differ in length, in labels and in what suits them keep in step, and compute what one process does."""

from pathlib import Path

import pytest

from tests.distributed import uneven
from tests.distributed.launching import launch, needs_compiler


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Losses of one process that holds both ranks' micro-batches, always scouts, and has plain layers."""
    never_plainly = {"context": 0.2, "plain_fallback": False}
    trainer = uneven.build(tmp_path_factory.mktemp("one"), 2, never_plainly, lean=False)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", pytest.param("zero3", marks=needs_compiler("zero3"))])
def test_different_ranks_keep_in_step(strategy, tmp_path, one_process):
    seen = launch(strategy, Path(uneven.__file__), [str(tmp_path / "out")], tmp_path / "seen", seconds=120)
    first, second = seen
    assert first["losses"] == pytest.approx(one_process, rel=1e-5)
    assert len(first["losses"]) == uneven.STEPS
    # in the third step one rank would rather train plainly: the mean of both says no; in the last both agree
    assert first["plain_shares"] == second["plain_shares"] == [0, 0, 0, 1]
