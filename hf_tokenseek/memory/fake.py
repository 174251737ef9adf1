"""Tensors without data: shapes, storages and their lifetimes are those of a real run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .four_bit import fake_4bit, is_4bit


@contextmanager
def fake_tensors(mode: FakeTensorMode | None = None) -> Iterator[FakeTensorMode]:
    """
    Inside the block, tensors have no data.

    Args:
        mode (`FakeTensorMode`, *optional*): of tensors that are to be used in it; a new one if there are none.
    """
    from transformers import masking_utils

    # it cannot read fake positions, takes them for packed ones and builds a mask that a real run does without
    original, masking_utils.find_packed_sequence_indices = masking_utils.find_packed_sequence_indices, _not_packed
    try:
        with mode or FakeTensorMode() as entered:
            yield entered
    finally:
        masking_utils.find_packed_sequence_indices = original


def fake_model(build: Callable[[], nn.Module], mode: FakeTensorMode) -> nn.Module:
    """
    The model that `build` makes, with fake tensors on the CPU in place of all of its weights.

    It is built on the meta device, because PEFT cannot add adapters to fake weights.
    """
    with torch.device("meta"):
        model = build()
    known: dict[int, Tensor] = {}
    with mode:
        for module in model.modules():
            for held in (module._parameters, module._buffers, vars(module)):
                for name, tensor in held.items():
                    if isinstance(tensor, Tensor):
                        # tied weights stay tied
                        held[name] = known.setdefault(id(tensor), _on_cpu(tensor))
    return model


def _on_cpu(tensor: Tensor) -> Tensor:
    if is_4bit(tensor):
        return fake_4bit(tensor)
    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _not_packed(*args, **kwargs) -> None:
    return None
