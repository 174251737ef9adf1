import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"hf_tokenseek": ROOT / "hf_tokenseek", "tokenseek_kernels": ROOT / "kernels" / "tokenseek_kernels"}
# what the report's page is made of
DATA = ("*.jinja", "*.css", "*.js")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of the sources, so that the checkout stays clean."""
    pytest.importorskip("build")
    sources, output = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    for name in (
        "setup.cfg",
        "setup.py",
        "pyproject.toml",
        "LICENSE",
        "README.md",
        "hf_tokenseek",
        "kernels",
        "tests",
    ):
        (sources / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(output), str(sources)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return next(output.glob("*.whl"))


def test_the_wheel_holds_both_packages_whole_and_nothing_else(wheel):
    expected = {
        f"{name}/{file.relative_to(folder).as_posix()}"
        for name, folder in PACKAGES.items()
        for pattern in ("*.py", *DATA)
        for file in folder.rglob(pattern)
    }
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert found == expected


def test_every_folder_of_sources_is_a_package():
    for folder in PACKAGES.values():
        assert {file.parent for file in folder.rglob("*.py")} == {file.parent for file in folder.rglob("__init__.py")}


def test_the_installed_wheel_imports_in_a_clean_environment(wheel, tmp_path):
    venv.create(tmp_path, with_pip=False)
    python = tmp_path / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    where = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    packages = Path(subprocess.run([python, "-c", where], capture_output=True, text=True, check=True).stdout.strip())
    zipfile.ZipFile(wheel).extractall(packages)
    # the dependencies are read from where the tests run; the checkout itself is out of sight
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    script = (
        "import sys; sys.meta_path = [finder for finder in sys.meta_path if '__editable__' not in repr(finder)]\n"
        "import hf_tokenseek, tokenseek_kernels\n"
        "from hf_tokenseek import *\n"
        "print(hf_tokenseek.__file__, tokenseek_kernels.__file__, sep='\\n')"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run([python, "-c", script], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert run.returncode == 0, run.stderr
    assert [Path(line).parent for line in run.stdout.split()] == [packages / name for name in PACKAGES]
