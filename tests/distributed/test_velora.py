"""VeLoRA on two ranks: one process's run, the same directions everywhere, checkpoints that go on."""

import pytest

from tests.distributed.launching import VELORA, needs_compiler
from tests.distributed.test_strategies import assert_method_run

# strategy, configuration, and whether it is also resumed: where weights are not read as one process reads them
CASES = [
    ("ddp", "mixed", False),
    ("ddp", "compressed", False),
    ("fsdp2", "mixed", True),
    ("zero1", "mixed", False),
    ("zero2", "mixed", False),
    ("zero3", "mixed", True),
]


@pytest.mark.parametrize("strategy, config, resume", [pytest.param(*c, marks=needs_compiler(c[0])) for c in CASES])
def test_two_ranks_equal_one_process_and_resume(strategy, config, resume, options, one_method_process):
    seen = assert_method_run(strategy, config, resume, VELORA[config], options, one_method_process)
    # drawn again in the third step, with and without a break before it
    assert len({rank["directions"] for rank in seen}) == 1 and seen[0]["directions"] is not None
