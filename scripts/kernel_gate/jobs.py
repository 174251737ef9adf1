"""What there is to compile: every configuration that a `triton.py` of the kernels' package lists, for every target."""

import functools
import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import tokenseek_kernels
from tokenseek_kernels.compilation import TARGETS, Compilation

from .build import Row, build


class Job(NamedTuple):
    """
    One compilation, by name, so that it can be sent to another process.

    Attributes:
        module (`str`): module whose `compilations(target)` lists it.
        target (`str`): key of `TARGETS`.
        index (`int`): its place in that list.
        aligned (`bool`): whether pointers and strides are known to be multiples of 16.
    """

    module: str
    target: str
    index: int
    aligned: bool

    @property
    def compilation(self) -> Compilation:
        return listed(self.module, self.target)[self.index]

    @property
    def unknown(self) -> Row:
        """Its row before anything is compiled."""
        return Row.of(self.compilation, TARGETS[self.target], self.aligned)

    def run(self) -> Row:
        """Compiles it."""
        return build(self.compilation, TARGETS[self.target], self.aligned)


@functools.cache
def listed(module: str, target: str) -> list[Compilation]:
    """The compilations of a module for a target."""
    return importlib.import_module(module).compilations(TARGETS[target])


def kernel_modules() -> list[str]:
    """Every `triton.py` of the kernels' package, found on disk."""
    (root,) = tokenseek_kernels.__path__
    return sorted(f"tokenseek_kernels.{path.parent.name}.triton" for path in Path(root).glob("*/triton.py"))


def find_jobs(modules: Iterable[str], targets: Iterable[str]) -> list[Job]:
    """
    All jobs of some modules, each aligned and not.

    Raises:
        ValueError: two compilations for one target have the same name; a table could not tell them apart.
    """
    jobs, names = [], set()
    for target in targets:
        for module in modules:
            for index, compilation in enumerate(listed(module, target)):
                if (compilation.name, target) in names:
                    raise ValueError(f"{compilation.name!r} is listed for {target} twice. Names must be unique.")
                names.add((compilation.name, target))
                jobs += (Job(module, target, index, aligned) for aligned in (True, False))
    return jobs
