"""Sparse tuning on two ranks: one process's run, the same layers everywhere, checkpoints that go on."""

import pytest

from tests.distributed.launching import IST, needs_compiler
from tests.distributed.test_strategies import assert_method_run

# strategy, configuration, and whether it is also resumed
CASES = [
    ("ddp", "ist", True),
    ("ddp", "random", False),
    ("fsdp2", "ist", True),
    ("fsdp2", "gradient_norm", False),
    ("zero1", "random", False),
    ("zero2", "ist", True),
    ("zero3", "ist", True),
]


@pytest.mark.parametrize("strategy, config, resume", [pytest.param(*c, marks=needs_compiler(c[0])) for c in CASES])
def test_two_ranks_equal_one_process_and_resume(strategy, config, resume, options, one_method_process):
    seen = assert_method_run(strategy, config, resume, IST[config], options, one_method_process)
    history, importance = seen[0]["layers"]
    assert all(rank["layers"] == seen[0]["layers"] for rank in seen)
    assert len(history) > 1 and (config != "ist" or any(importance["values"]))
