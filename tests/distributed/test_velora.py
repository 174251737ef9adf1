"""VeLoRA on two ranks: one process's run, the same directions everywhere, checkpoints that go on."""

import pytest

from tests.distributed.launching import VELORA, launch, needs_compiler
from tests.distributed.test_strategies import RECIPE, STRATEGIES, assert_is, assert_same_run, losses

# strategy, configuration, and whether it is also resumed: where weights are not read as one process reads them
CASES = [
    ("ddp", "mixed", False),
    ("ddp", "compressed", False),
    ("fsdp2", "mixed", True),
    ("zero2", "mixed", False),
    ("zero3", "mixed", True),
]


@pytest.mark.parametrize("strategy, config, resume", [pytest.param(*c, marks=needs_compiler(c[0])) for c in CASES])
def test_two_ranks_equal_one_process_and_resume(strategy, config, resume, options, one_method_process):
    folder, name = options.folder, f"{strategy}_{config}"
    whole = options(name, 2, "--save_strategy", "steps" if resume else "no", *VELORA[config])
    seen = launch(strategy, RECIPE, whole, folder / f"{name}_seen")
    for rank in seen:
        assert_is(rank, STRATEGIES[strategy])
    expected = assert_same_run(folder / name, one_method_process(config))

    if resume:
        more = "--resume_from_checkpoint", str(folder / name / "checkpoint-2"), "--save_strategy", "no"
        resumed = options(f"{name}_resumed", 2, *more, *VELORA[config])
        seen += launch(strategy, RECIPE, resumed, folder / f"{name}_resumed_seen")
        assert losses(folder / f"{name}_resumed")[-2:] == pytest.approx(expected[-2:], rel=1e-5)
    # drawn again in the third step, with and without a break before it
    assert len({rank["directions"] for rank in seen}) == 1 and seen[0]["directions"] is not None
