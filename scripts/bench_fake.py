"""Fake tensors as a stand-in for a real step, and a memory tracker that looks into TokenSeek's operators."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_tokenseek.memory import LiveMemory
from tokenseek_kernels.attention_mass import function as mass
from tokenseek_kernels.linear_cross_entropy import function as loss
from tokenseek_kernels.selected_attention import function as attention

OPERATORS = (
    mass._mass_op,
    loss._forward,
    loss._backward,
    loss._statistics,
    attention._forward_op,
    attention._backward_op,
    attention._overlay_op,
)
BODIES = {operator.operator._opoverload: operator.function for operator in OPERATORS}


class LiveMemoryInside(LiveMemory):
    """
    [`LiveMemory`] that looks into TokenSeek's operators, which are one call each to the plain one. Layers are alike,
    so each operator is looked into once for the same shapes.

    Attributes:
        inside_bytes (`int`): the most that one of them took beyond its results.
    """

    def __init__(self, *roots):
        super().__init__(*roots)
        self.inside_bytes = 0
        self._rise: dict[tuple, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func not in BODIES:
            return super().__torch_dispatch__(func, types, args, kwargs)
        before, overall = self.bytes, self.peak_bytes
        call = (func, *((a.dtype, a.shape) if isinstance(a, Tensor) else a for a in args))
        if call in self._rise:
            result = super().__torch_dispatch__(func, types, args, kwargs)
        else:
            self._storages.peak_bytes = before
            with self:
                result = BODIES[func](*args, **(kwargs or {}))
            self._rise[call] = self.peak_bytes - before
            self.inside_bytes = max(self.inside_bytes, self.peak_bytes - self.bytes)
        self._storages.peak_bytes = max(overall, self.peak_bytes, before + self._rise[call])
        return result


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Tensors without data inside the block."""
    from transformers import masking_utils

    # it cannot read fake positions, takes them for packed ones and builds a mask that a real run does without
    original, masking_utils.find_packed_sequence_indices = masking_utils.find_packed_sequence_indices, _not_packed
    try:
        with FakeTensorMode():
            yield
    finally:
        masking_utils.find_packed_sequence_indices = original


def _not_packed(*args, **kwargs) -> None:
    return None
