"""Our figures in the trackers that `report_to` names, without extra code."""

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import Trainer
from transformers.integrations import TensorBoardCallback

from hf_tokenseek import MemoryCallback, SeekCallback
from tests.tiny_training import SELECTS, arguments, trainer

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ["seek/selected_share", "seek/evidence_mass", "memory/saved_activations_mib", "speed/step_seconds"]


@pytest.mark.parametrize("stock", [False, True], ids=["ours", "stock"])
def test_tensorboard(tiny_llama, tmp_path, monkeypatch, stock):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    if stock:
        callbacks = [SeekCallback(SELECTS), MemoryCallback(), TensorBoardCallback()]
        own = trainer(tiny_llama(), arguments(tmp_path), kind=Trainer, callbacks=callbacks)
    else:
        own = trainer(tiny_llama(), arguments(tmp_path, SELECTS, report_to=["tensorboard"]))
    own.train()
    events = accumulator.EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    for name in FIGURES:
        assert [event.step for event in events.Scalars(f"train/{name}")] == [1, 2, 3, 4]


RUN = """
from tests.conftest import tiny_llama
from tests.tiny_training import SELECTS, arguments, trainer
trainer(tiny_llama.__wrapped__()(), arguments("out", SELECTS, report_to=["trackio"], project="tiny")).train()
"""


def test_trackio(tmp_path):
    """In a process of its own: trackio reads its folder when it is imported."""
    pytest.importorskip("trackio")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path), "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", RUN], check=True, cwd=tmp_path, env=environment, capture_output=True)
    [database] = tmp_path.glob("tiny*.db")
    rows = sqlite3.connect(database).execute("select metrics from metrics").fetchall()
    for name in FIGURES:
        assert sum(f'"train/{name}"' in str(row[0]) for row in rows) == 4
