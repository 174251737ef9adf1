from importlib.metadata import distributions
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from recipes.models import SMOLLM2_PACKAGE

ROOT = Path(__file__).resolve().parents[2]
INSTALLED = any(found.name == SMOLLM2_PACKAGE for found in distributions())


@pytest.mark.skipif(not INSTALLED, reason=f"the model is in the package {SMOLLM2_PACKAGE}")
def test_the_notebook_runs_and_says_what_it_promises():
    notebook = nbformat.read(ROOT / "recipes" / "tokenseek.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "keep outputs out of the repository"
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    said = "".join(output.get("text", "") for output in notebook.cells[-2].outputs)
    plain, seek = said.split("TokenSeek + lean")
    saved = [float(part.split("saved_activations_mib ")[1].split()[0]) for part in (plain, seek)]
    first = [part.split("losses [")[1].split(",")[0] for part in (plain, seek)]
    assert saved[1] < 0.3 * saved[0]
    assert first[0] == first[1]
