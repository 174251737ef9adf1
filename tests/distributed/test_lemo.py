"""LeMo on two ranks: one process's run, checkpoints that go on."""

import json

import pytest

from tests.distributed.launching import LEMO, STEPS, needs_compiler
from tests.distributed.test_strategies import assert_method_run

# strategy, configuration, and whether it is also resumed
CASES = [
    ("ddp", "lemo", True),
    ("ddp", "lemo_detach", False),
    ("ddp", "lemo_layer_below", False),
    ("ddp", "lemo_lean", False),
    ("fsdp2", "lemo_lean", False),
    ("zero3", "lemo_lean", False),
    ("fsdp2", "lemo_seek", True),
    ("fsdp2", "lemo_checkpointed", False),
    ("zero2", "lemo", False),
    ("zero3", "lemo_detach", False),
    ("zero3", "lemo_seek", True),
]


@pytest.mark.parametrize("strategy, config, resume", [pytest.param(*c, marks=needs_compiler(c[0])) for c in CASES])
def test_two_ranks_equal_one_process_and_resume(strategy, config, resume, options, one_method_process):
    assert_method_run(strategy, config, resume, LEMO[config], options, one_method_process)
    state = json.loads((options.folder / f"{strategy}_{config}" / "trainer_state.json").read_text())
    shares = [entry["lemo/kept_share"] for entry in state["log_history"] if "loss" in entry]
    assert len(shares) == STEPS and all(0.4 < share < 0.6 for share in shares)
