"""What layers keep for the backward pass, moved to the host's memory: each layer up to its part of a budget."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef

from tokenseek_kernels.dispatch import is_on_gpu

from ..memory.saved import is_parameter, top_hooks

GIB = 2**30
# what is smaller stays: moving it would take longer than it is worth
LEAST_BYTES = 2**16


class Offload:
    """
    Host memory for what layers keep, divided among them by how much that is: one that drops tokens keeps less, and
    has less of it to move ("sparsity-sensitive offload" of [Jenga](https://huggingface.co/papers/2501.09767)). What
    they keep is what they kept in the micro-batch before; of the first one only the share of tokens is known.

    Copies are ordered with what is computed: each layer's forward waits for its part to leave, its backward for it to
    come back. Gradients are the same, bit for bit.

    Args:
        gib (`float`): what a micro-batch may move, in GiB.
        shares (`list[float]`): share of tokens that each layer keeps.

    Attributes:
        budgets (`list[int]`): bytes that each layer may move.
        kept (`list[int]`), moved (`list[int]`):
            Bytes that could move, and those that did, of each layer in the last forward pass.
    """

    def __init__(self, gib: float, shares: list[float]):
        self._gib = gib
        self.budgets = self._divided(shares)
        self.kept, self.moved = [0] * len(shares), [0] * len(shares)
        self._fixed: set[int] = set()
        # what several operations save, of one layer or of several, moves once
        self._known: WeakValueDictionary[tuple, _Moved] = WeakValueDictionary()

    def begin(self, model: nn.Module) -> None:
        """
        A micro-batch begins.

        Args:
            model (`nn.Module`): its buffers, which are there anyway, do not move.
        """
        if any(self.kept):
            self.budgets = self._divided(self.kept)
        self.kept, self.moved = [0] * len(self.kept), [0] * len(self.moved)
        self._fixed = {buffer.untyped_storage()._cdata for buffer in model.buffers()}

    @contextmanager
    def of(self, layer: int) -> Iterator[None]:
        """
        Inside the block what autograd saves on a GPU goes to the host, while the layer's budget lasts.

        Args:
            layer (`int`): its index.
        """
        stays, seen = top_hooks() or (_as_it_is, _as_it_is), set()

        def pack(tensor: Tensor):
            key = _key(tensor)
            moved = self._known.get(key)
            if moved is None and self._takes(layer, tensor, first=key not in seen):
                moved = self._known[key] = _Moved(tensor)
            seen.add(key)
            return partial(stays[1], stays[0](tensor)) if moved is None else moved.view_of(tensor)

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda give: give()):
            yield

    def _divided(self, weights: list[float]) -> list[int]:
        return [int(self._gib * GIB * weight / sum(weights)) for weight in weights]

    def _takes(self, layer: int, tensor: Tensor, first: bool) -> bool:
        """Whether a tensor moves, which its layer's figures then say; `first` time that the layer saves it or not."""
        storage = tensor.untyped_storage()
        may = type(tensor) in (Tensor, FakeTensor) and is_on_gpu(tensor) and storage.nbytes() >= LEAST_BYTES
        if not may or is_parameter(tensor) or storage._cdata in self._fixed:
            return False
        self.kept[layer] += storage.nbytes() * first
        fits = storage.nbytes() <= self.budgets[layer] - self.moved[layer]
        self.moved[layer] += storage.nbytes() * fits
        return fits


class _Moved:
    """
    A storage in the host's memory. Views of it are its own once more when they are asked for.

    Args:
        tensor (`torch.Tensor`): any view of it.
    """

    def __init__(self, tensor: Tensor):
        storage = tensor.untyped_storage()
        # while it is held no other storage comes to have its key
        self._reference = StorageWeakRef(storage)
        self.nbytes = storage.nbytes()
        whole = tensor.detach().as_strided((self.nbytes // tensor.itemsize,), (1,), 0)
        self._bring, self._back, self._views = _to_host(whole), None, 0

    def view_of(self, tensor: Tensor) -> Callable[[], Tensor]:
        """What gives a tensor back to the operation that has saved it."""
        self._views += 1
        return partial(self._give, tensor.shape, tensor.stride(), tensor.storage_offset())

    def _give(self, *place) -> Tensor:
        """The tensor on its device: one copy for all views, until the last of them is given."""
        back = self._bring() if self._back is None else self._back
        self._views -= 1
        self._back = back if self._views > 0 else None
        return back.as_strided(*place)


def _to_host(tensor: Tensor) -> Callable[[], Tensor]:
    """Copies a tensor into the host's memory; returns what brings it back."""
    if isinstance(tensor, FakeTensor):
        # the memory that is simulated is not the host's
        return partial(torch.empty, tensor.shape, dtype=tensor.dtype, device=tensor.device)
    # from and to pinned memory copies run in their stream's order, and the host does not wait for them
    host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.device.type != "cpu")
    host.copy_(tensor, non_blocking=True)
    return partial(host.to, tensor.device, non_blocking=True)


def _key(tensor: Tensor) -> tuple:
    """Views of one storage that nothing has been written into between them have the same."""
    return StorageWeakRef(tensor.untyped_storage()).cdata, tensor._version, tensor.dtype


def _as_it_is(tensor: Tensor) -> Tensor:
    # an operator may save its own output: kept with its graph, the graph would keep itself alive
    return tensor if tensor.grad_fn is None else tensor.detach()
