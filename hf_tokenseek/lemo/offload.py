"""What layers keep for the backward pass, moved to the host's memory: each layer up to its part of a budget."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef

from tokenseek_kernels.dispatch import is_on_gpu

from ..memory.saved import is_parameter, top_hooks

GIB = 2**30
# what is smaller stays: moving it would take longer than it is worth
LEAST_BYTES = 2**16


class Offload:
    """
    Host memory for what layers keep, divided among them as their tokens are: one that drops tokens keeps less, and
    has less of it to move ("sparsity-sensitive offload" of [Jenga](https://huggingface.co/papers/2501.09767)).

    Copies are ordered with what is computed: each layer's forward waits for its part to leave, its backward for it to
    come back. Gradients are the same, bit for bit.

    Args:
        gib (`float`): host memory that a micro-batch may use, in GiB.
        shares (`list[float]`): share of tokens that each layer keeps.

    Attributes:
        budgets (`list[int]`): bytes that each layer may move.
        moved (`list[int]`): bytes that each layer has moved in its last forward pass.
    """

    def __init__(self, gib: float, shares: list[float]):
        self.budgets = [int(gib * GIB * share / sum(shares)) for share in shares]
        self.moved = [0] * len(shares)
        # what several operations save, of one layer or of several, moves once
        self._known: WeakValueDictionary[tuple, _Moved] = WeakValueDictionary()

    @contextmanager
    def of(self, layer: int) -> Iterator[None]:
        """
        Inside the block what autograd saves on a GPU goes to the host, while the layer's budget lasts.

        Args:
            layer (`int`): its index.
        """
        kept = top_hooks() or (_as_it_is, _as_it_is)
        self.moved[layer] = 0

        def pack(tensor: Tensor):
            key = _key(tensor)
            moved = self._known.get(key)
            if moved is None:
                if not self._fits(layer, tensor):
                    return partial(kept[1], kept[0](tensor))
                moved = self._known[key] = _Moved(tensor)
                self.moved[layer] += moved.nbytes
            return moved.view_of(tensor)

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda give: give()):
            yield

    def _fits(self, layer: int, tensor: Tensor) -> bool:
        room = LEAST_BYTES <= tensor.untyped_storage().nbytes() <= self.budgets[layer] - self.moved[layer]
        return room and is_on_gpu(tensor) and not is_parameter(tensor)


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
    host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    host.copy_(tensor, non_blocking=True)
    return partial(host.to, tensor.device, non_blocking=True)


def _key(tensor: Tensor) -> tuple:
    """Views of one storage that nothing has been written into between them have the same."""
    return StorageWeakRef(tensor.untyped_storage()).cdata, tensor._version, tensor.dtype


def _as_it_is(tensor: Tensor) -> Tensor:
    # an operator may save its own output: kept with its graph, the graph would keep itself alive
    return tensor if tensor.grad_fn is None else tensor.detach()
