import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [
    ".ci/run",
    *(f"scripts/{name}.sh" for name in ("demo", "setup_checks", "setup_env", "test", "test_gpu", "test_oldest")),
]

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="the scripts are for bash")


@pytest.fixture
def checkout(tmp_path):
    """A copy of what set-up reads, without an environment."""
    shutil.copytree(ROOT / "scripts", tmp_path / "checkout" / "scripts")
    for name in ("setup.cfg", "setup.py"):
        shutil.copy(ROOT / name, tmp_path / "checkout")
    return tmp_path / "checkout"


@pytest.fixture
def bare_path(tmp_path):
    """A folder for PATH with the basic tools and neither Python nor nvidia-smi; tests add fakes to it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("awk", "bash", "cat", "cksum", "df", "dirname", "touch", "tr"):
        (folder / tool).symlink_to(shutil.which(tool))
    return folder


def fake(folder, name, script):
    (folder / name).write_text(f"#!/bin/bash\n{script}\n")
    (folder / name).chmod(0o755)


# what makes an environment: its folder, and how many GiB it may take
SET_UPS = {"source scripts/setup_env.sh demo": (".venv", 6), "bash scripts/test_oldest.sh": (".venv-oldest", 3)}


@pytest.fixture(params=SET_UPS)
def set_up(request):
    """One of the commands that make an environment."""
    return request.param


def run_set_up(checkout, bare_path, command="source scripts/setup_env.sh demo"):
    return subprocess.run(
        [shutil.which("bash"), "-c", f"set -euo pipefail; {command}; echo went on"],
        cwd=checkout,
        env={**os.environ, "PATH": str(bare_path), "PYTHON": ""},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_parse(script):
    subprocess.run(["bash", "-n", ROOT / script], check=True)


def assert_ends_with_one_clear_line(run, *fragments):
    assert run.returncode != 0
    assert "went on" not in run.stdout
    errors = run.stderr.strip().splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("[set-up] ERROR: ")
    for fragment in fragments:
        assert fragment in errors[0]


def test_a_missing_python_is_said(checkout, bare_path, set_up):
    assert_ends_with_one_clear_line(run_set_up(checkout, bare_path, set_up), "no python3.10 or newer", "PYTHON=")


def test_an_old_python_is_as_good_as_none(checkout, bare_path, set_up):
    fake(bare_path, "python3", "exit 1")
    assert_ends_with_one_clear_line(run_set_up(checkout, bare_path, set_up), "no python3.10 or newer")


def test_a_full_disk_is_said(checkout, bare_path, set_up):
    fake(bare_path, "python3", "exit 0")
    (bare_path / "df").unlink()
    fake(bare_path, "df", "printf 'head\\n/dev/disk 9 8 1048576 99%% /\\n'")
    assert_ends_with_one_clear_line(
        run_set_up(checkout, bare_path, set_up), "has 1024 MiB free", f"up to {SET_UPS[set_up][1]} GiB"
    )


def test_an_unreachable_package_index_is_said(checkout, bare_path, set_up):
    # stands for python3 and for the environment's own: everything works but installing
    fake(bare_path, "python3", 'case "$*" in *install*) exit 1;; esac; exit 0')
    environment = checkout / SET_UPS[set_up][0] / "bin"
    environment.mkdir(parents=True)
    shutil.copy(bare_path / "python3", environment / "python")
    assert_ends_with_one_clear_line(run_set_up(checkout, bare_path, set_up), "cannot reach its package index")


def test_a_ready_environment_is_reused_until_its_inputs_change(checkout, bare_path):
    log = checkout / "calls"
    fake(bare_path, "python3", "exit 0")
    environment = checkout / ".venv" / "bin"
    environment.mkdir(parents=True)
    fake(environment, "python", f'printf "%s\\n" "$*" >> {log}; echo Python')

    def installs():
        return sum(" install " in line for line in log.read_text().splitlines())

    first = run_set_up(checkout, bare_path)
    assert first.returncode == 0, first.stderr
    assert first.stdout.endswith("went on\n")
    assert "--constraint scripts/constraints-cpu.txt" in log.read_text()
    once = installs()
    assert run_set_up(checkout, bare_path).returncode == 0
    assert installs() == once
    with (checkout / "setup.cfg").open("a") as file:
        file.write("# changed\n")
    assert run_set_up(checkout, bare_path).returncode == 0
    assert installs() == 2 * once


def test_an_nvidia_gpu_gets_the_ordinary_build(checkout, bare_path):
    log = checkout / "calls"
    fake(bare_path, "python3", "exit 0")
    fake(bare_path, "nvidia-smi", "exit 0")
    environment = checkout / ".venv" / "bin"
    environment.mkdir(parents=True)
    fake(environment, "python", f'printf "%s\\n" "$*" >> {log}; echo Python')
    assert run_set_up(checkout, bare_path).returncode == 0
    assert "constraint" not in log.read_text()
