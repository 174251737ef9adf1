"""On a machine without a GPU, what needs one says so in one line and ends well."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
NOTHING = "no GPU found: nothing was run\n"

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@pytest.mark.skipif(shutil.which("bash") is None or os.path.exists("/dev/kfd"), reason="needs bash, and no AMD GPU")
def test_the_lane_says_that_there_is_none():
    subprocess.run(["bash", "-n", ROOT / "scripts" / "test_gpu.sh"], check=True)
    run = subprocess.run(["bash", ROOT / "scripts" / "test_gpu.sh"], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, NOTHING)


def test_the_benchmark_says_that_there_is_none(script, capsys):
    assert script("bench_kernels").main([]) == 0
    assert capsys.readouterr().out == NOTHING


def test_the_benchmark_needs_no_triton_to_say_so(tmp_path):
    (tmp_path / "triton.py").write_text("raise ImportError('no triton here')")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT / "kernels"), str(ROOT)))}
    script = ROOT / "scripts" / "bench_kernels.py"
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert (run.returncode, run.stdout) == (0, NOTHING), run.stderr
