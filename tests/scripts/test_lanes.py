"""scripts/test.sh: which lanes run, in which process, and that none of them fails unseen."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SUITE, INTERPRETER = "[] -m pytest -q -n auto", "[1] -m pytest -q -n auto tests/interpreter"
COMPILE = "[] scripts/check_kernels.py --changed"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="the scripts are for bash")


@pytest.fixture
def lanes(tmp_path):
    """Runs the script in a copy of the checkout whose Python writes down its calls and fails where it is told to."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    environment = tmp_path / ".venv" / "bin"
    environment.mkdir(parents=True)
    calls = tmp_path / "calls"
    python = environment / "python"
    python.write_text(
        f'#!/bin/bash\ncase $* in *pytest*|*check_kernels*) echo "[${{TRITON_INTERPRET:-}}] $*" >> {calls};; esac\n'
        '[[ -n "$FAILING" && "$*" == *"$FAILING"* ]] && exit 1\nexit 0\n'
    )
    python.chmod(0o755)

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
    assert calls == [SUITE, INTERPRETER, COMPILE]


@pytest.mark.parametrize("failing", ["pytest -q", "tests/interpreter", "check_kernels"])
def test_a_lane_that_fails_stops_no_other_and_is_named(lanes, failing):
    done, calls = lanes(failing=failing)
    assert done.returncode == 1
    assert len(calls) == 3
    named = {"pytest -q": "suite interpreter", "tests/interpreter": "interpreter", "check_kernels": "compile"}[failing]
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
    done, calls = lanes("--lane", "another")
    assert (done.returncode, calls) == (1, [])
    assert "--lane takes suite, interpreter or compile" in done.stderr
