"""
The kernels' tests: in Triton's interpreter on CPU tensors, or on a GPU.

    TRITON_INTERPRET=1 python -m pytest tests/interpreter       # set before Python starts: Triton reads it at import
    TOKENSEEK_GPU=1 python -m pytest tests/interpreter          # what scripts/test_gpu.sh runs
"""

import functools
import importlib
import inspect
import os
import sys
from pathlib import Path

import pytest
import torch

import tokenseek_kernels
from tokenseek_kernels.compilation import TARGETS

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = not INTERPRETING and os.environ.get("TOKENSEEK_GPU") == "1" and torch.cuda.is_available()
WHY_NOT = (
    "needs Triton's interpreter (TRITON_INTERPRET=1 before Python starts; scripts/test.sh does it in a lane of its "
    "own) or a GPU (scripts/test_gpu.sh)"
)

if INTERPRETING:
    from tests.interpreter import bf16_shim

    bf16_shim.install()


class _OtherLane(pytest.Module):
    """A test file that is skipped unread, so that an ordinary run needs no Triton."""

    def collect(self):
        pytest.skip(WHY_NOT, allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    """Skips every file of this folder outside of its two lanes."""
    if not (INTERPRETING or ON_GPU):
        return _OtherLane.from_parent(parent, path=module_path)


@pytest.fixture(scope="session")
def device() -> str:
    """Where the kernels run: `"cpu"` in the interpreter, else `"cuda"`."""
    return "cpu" if INTERPRETING else "cuda"


@pytest.fixture(autouse=True)
def poisoned_empties(monkeypatch):
    """Memory that the kernels' package allocates without a value is NaN (the largest integer), never a lucky zero."""
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))


@pytest.fixture(autouse=True)
def launches_are_gated(monkeypatch):
    """
    Every kernel of the package that a test launches is listed for the compile gate, and its floats are constants: a
    compiled kernel would get them as float32 arguments, which the interpreter does not show.
    """
    from triton.runtime.jit import KernelInterface

    launch = KernelInterface.__getitem__

    def checked(kernel, grid):
        ours = kernel.fn.__module__.startswith("tokenseek_kernels.")
        if not ours:
            return launch(kernel, grid)
        assert kernel.fn in _gated(), f"{kernel.fn.__name__} is launched, but no compilations() lists it"

        def run(**arguments):
            constants = inspect.get_annotations(kernel.fn)  # nothing else in our kernels' signatures is annotated
            floats = [name for name, value in arguments.items() if isinstance(value, float) and name not in constants]
            assert not floats, f"{kernel.fn.__name__} gets {floats} rounded to float32: make them tl.constexpr"
            return launch(kernel, grid)(**arguments)

        return run

    monkeypatch.setattr(KernelInterface, "__getitem__", checked)


@functools.cache
def _gated() -> set:
    files = (file for root in tokenseek_kernels.__path__ for file in Path(root).glob("*/triton.py"))
    modules = (importlib.import_module(f"tokenseek_kernels.{file.parent.name}.triton") for file in files)
    return {listed.kernel.fn for module in modules for listed in module.compilations(TARGETS["sm_80"])}


def _poisoned(allocate):
    def poisoned(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if not caller.startswith("tokenseek_kernels"):
            return tensor
        floating = tensor.is_floating_point() or tensor.is_complex()
        return tensor.fill_(float("nan") if floating else _largest(tensor.dtype))

    return poisoned


def _largest(dtype: torch.dtype) -> int:
    return True if dtype == torch.bool else torch.iinfo(dtype).max
