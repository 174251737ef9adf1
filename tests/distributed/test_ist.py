"""Sparse tuning on two ranks: one process's run, the same layers everywhere, checkpoints that go on."""

import pytest

from tests.distributed.launching import IST, launch, needs_compiler
from tests.distributed.test_strategies import RECIPE, STRATEGIES, assert_is, assert_same_run, losses

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
    folder, name = options.folder, f"{strategy}_{config}"
    whole = options(name, 2, "--save_strategy", "steps" if resume else "no", *IST[config])
    seen = launch(strategy, RECIPE, whole, folder / f"{name}_seen")
    for rank in seen:
        assert_is(rank, STRATEGIES[strategy])
    expected = assert_same_run(folder / name, one_method_process(config))

    if resume:
        more = "--resume_from_checkpoint", str(folder / name / "checkpoint-2"), "--save_strategy", "no"
        resumed = options(f"{name}_resumed", 2, *more, *IST[config])
        seen += launch(strategy, RECIPE, resumed, folder / f"{name}_resumed_seen")
        assert losses(folder / f"{name}_resumed")[-2:] == pytest.approx(expected[-2:], rel=1e-5)
    history, importance = seen[0]["layers"]
    assert all(rank["layers"] == seen[0]["layers"] for rank in seen)
    assert len(history) > 1 and (config != "ist" or any(importance["values"]))
