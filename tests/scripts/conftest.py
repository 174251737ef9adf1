import importlib
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch):
    """Imports a script as Python does when it is run: its folder stands first on the path."""
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module
