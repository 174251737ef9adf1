"""Two ranks on this machine's CPU, started as a user starts them."""

import json
import os
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RANKS = 2
STEPS = 3
# options of the recipe: new directions in the last step, which is the one after the checkpoint
VELORA = {
    "mixed": ("--seek", "false", "--velora", '{"groups": 8, "projector": "mixed", "refresh_steps": 2}'),
    "compressed": ("--seek", "false", "--velora", '{"groups": 8, "compressed_state": true, "refresh_steps": 2}'),
}

# layers change in the last step, which is the one after the checkpoint; importance is learned just before
IST = {
    "ist": ("--seek", "false", "--ist", '{"layers": 0.34, "period": 2, "score_steps": 1, "beta": 0}'),
    "random": ("--ist", '{"layers": 0.34, "policy": "random", "period": 1, "seed": 3}'),
    "gradient_norm": ("--seek", "false", "--ist", '{"layers": 0.34, "policy": "gradient_norm", "period": 1}'),
}

# half of the blocks have room for all labels; which ones a sequence keeps does not depend on the batch that it is in
_LEMO = {"keep": 0.5, "block": 8, "dense_first": 0}
LEMO = {
    "lemo": ("--seek", "false", "--lemo", json.dumps(_LEMO)),
    "lemo_seek": ("--lemo", json.dumps({**_LEMO, "dense_first": 1})),
    "lemo_detach": ("--seek", "false", "--lemo", json.dumps({**_LEMO, "mode": "detach", "rescore": 1})),
    "lemo_layer_below": (
        *("--seek", "false", "--lemo"),
        json.dumps({**_LEMO, "dense_first": 1, "score": "previous_layer"}),
    ),
    # rows and norms from one kernel, whose weight ranks divide
    "lemo_lean": ("--seek", "false", "--lean", "true", "--mlp_tiles", "2", "--lemo", json.dumps(_LEMO)),
    "lemo_checkpointed": ("--seek", "false", "--gradient_checkpointing", "true", "--lemo", json.dumps(_LEMO)),
}


def needs_compiler(strategy: str) -> pytest.MarkDecorator:
    """DeepSpeed compiles its communication for CPUs."""
    missing = strategy.startswith("zero") and (find_spec("deepspeed") is None or shutil.which("g++") is None)
    return pytest.mark.skipif(missing, reason="DeepSpeed needs its package and g++")


def launch(strategy: str, script: Path, arguments: list[str], seen: Path, seconds: int = 240) -> list[dict]:
    """
    Runs `accelerate launch --config_file recipes/accelerate/<strategy>.yaml script arguments`.

    Args:
        strategy (`str`): name of the configuration.
        script (`Path`): what each rank runs.
        arguments (`list[str]`): its command line.
        seen (`Path`): folder for what the ranks observe.
        seconds (`int`, *optional*, defaults to 240): more is a hang, which fails.

    Returns:
        `list[dict]`: what `observed.py` saw in each rank.
    """
    seen.mkdir(parents=True)
    environment = {
        **os.environ,
        **{"OBSERVED": str(seen), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"},
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]),
    }
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"),
        *("--config_file", f"recipes/accelerate/{strategy}.yaml", "tests/distributed/observed.py", str(script)),
        *arguments,
    ]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"{strategy}: no end after {seconds} s\n{process.communicate()[0][-6000:]}") from None
    assert process.returncode == 0, said[-6000:]
    return [json.loads((seen / f"{rank}.json").read_text()) for rank in range(RANKS)]
