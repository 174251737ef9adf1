import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from configparser import ConfigParser
from email import message_from_bytes
from pathlib import Path

import pytest
from packaging.requirements import Requirement

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


def ranges_of_setup() -> set[str]:
    """What setup.cfg asks for, as a wheel's metadata have it."""
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lists = {"": setup["options"]["install_requires"], **setup["options.extras_require"]}
    found = set()
    for extra, lines in lists.items():
        for line in filter(None, lines.splitlines()):
            requirement, _, marker = line.partition(";")
            markers = [marker.strip()] * bool(marker) + [f'extra == "{extra}"'] * bool(extra)
            found.add(str(Requirement(f"{requirement}; {' and '.join(markers)}" if markers else requirement)))
    return found


def test_the_wheel_asks_for_the_ranges_of_setup(wheel):
    (name,) = (name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".dist-info/METADATA"))
    metadata = message_from_bytes(zipfile.ZipFile(wheel).read(name))
    expected = ranges_of_setup()
    assert {str(Requirement(line)) for line in metadata.get_all("Requires-Dist")} == expected
    assert {"torch>=2.9", 'trl>=1.16; extra == "trl"'} <= expected
    assert metadata["Requires-Python"] == ">=3.10"


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Runs a program of a clean environment, away from the checkout, that pip has installed the wheel into."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=False)
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    pip = [sys.executable, "-m", "pip", "--python", str(programs / "python")]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)

    def run(program: str, *arguments: str) -> str:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [programs / program, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    packages = Path(run("python", "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip())
    # the dependencies are read from where the tests run, without what makes the checkout importable there
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    return run, packages


def test_the_installed_wheel_imports_in_a_clean_environment(installed):
    run, packages = installed
    script = (
        "import hf_tokenseek, tokenseek_kernels\n"
        "from hf_tokenseek import *\n"
        "print(hf_tokenseek.__file__, tokenseek_kernels.__file__, sep='\\n')"
    )
    assert [Path(line).parent for line in run("python", "-c", script).split()] == [
        packages / name for name in PACKAGES
    ]


def test_the_installed_wheel_has_its_command(installed):
    run, _ = installed
    said = run("hf-tokenseek", "--help")
    assert said.startswith("usage: hf-tokenseek") and all(name in said for name in ("estimate", "fit", "report"))
