"""scripts/test.sh: which lanes run, in which process, and that none of them fails unseen."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SUITE, INTERPRETER = "[] -m pytest -q -n auto", "[1] -m pytest -q -n auto tests/interpreter"
COMPILE = "[] scripts/check_kernels.py --changed"
CORE = "callbacks ist lean lemo peft sft test_arguments.py test_model_card.py test_trainer.py test_trainer_runs.py"
OLDEST = " ".join([SUITE, *(f"tests/{part}" for part in f"{CORE} test_training_options.py".split())])
OLDEST += " --ignore tests/lemo/test_families.py"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="the scripts are for bash")


@pytest.fixture
def lanes(tmp_path):
    """Runs the script in a copy of the checkout whose Python writes down its calls and fails where it is told to."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    calls = tmp_path / "calls"
    python, oldest = (tmp_path / venv / "bin" / "python" for venv in (".venv", ".venv-oldest"))
    for path in (python, oldest):
        path.parent.mkdir(parents=True)
    python.write_text(
        '#!/bin/bash\ncase "$*" in *"-m pytest"*|*check_kernels*) '
        f'echo "[${{TRITON_INTERPRET:-}}] $*" >> {calls};; esac\n'
        '[[ -n "$FAILING" && "$*" == *"$FAILING"* ]] && exit 1\nexit 0\n'
    )
    python.chmod(0o755)
    shutil.copy(python, oldest)

    def run(*arguments, failing=""):
        calls.unlink(missing_ok=True)
        variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        done = subprocess.run(
            ["bash", tmp_path / "scripts" / "test.sh", *arguments],
            env={**variables, "PYTHON": str(python), "FAILING": failing},
            capture_output=True,
            text=True,
        )
        return done, calls.read_text().splitlines() if calls.exists() else []

    return run


def test_all_lanes_run_the_kernels_in_processes_of_their_own(lanes):
    done, calls = lanes()
    assert done.returncode == 0, done.stderr
    assert calls == [SUITE, INTERPRETER, COMPILE, OLDEST]


@pytest.mark.parametrize(
    ("failing", "named"),
    [
        ("pytest -q", "suite interpreter oldest"),
        ("tests/interpreter", "interpreter"),
        ("check_kernels", "compile"),
        ("tests/sft", "oldest"),
    ],
)
def test_a_lane_that_fails_stops_no_other_and_is_named(lanes, failing, named):
    done, calls = lanes(failing=failing)
    assert done.returncode == 1
    assert len(calls) == 4
    assert done.stdout.endswith(f"[test] failed: {named}\n")


def test_without_triton_the_suite_is_left(lanes):
    done, calls = lanes(failing="import triton")
    assert done.returncode == 0, done.stderr
    assert calls == [SUITE]
    assert "Triton has no package for this system" in done.stdout


def test_arguments_go_to_the_suite_or_to_the_lane_that_is_named(lanes):
    assert lanes("tests/recipes", "-x")[1] == [f"{SUITE} tests/recipes -x"]
    assert lanes("--lane", "interpreter", "-k", "mass")[1] == [f"{INTERPRETER} -k mass"]
    assert lanes("--lane", "compile")[1] == [COMPILE]
    assert lanes("--lane", "oldest", "-x")[1] == [f"{OLDEST} -x"]
    done, calls = lanes("--lane", "another")
    assert (done.returncode, calls) == (1, [])
    assert "--lane takes suite, interpreter, compile or oldest" in done.stderr
