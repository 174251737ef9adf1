"""Counting bytes by storage, without keeping any storage alive."""

import weakref
from collections.abc import Hashable
from functools import partial

from torch import Tensor


class LiveStorages:
    """
    The bytes of the storages shown to it that are still alive. Views of one storage count once.

    A storage is followed through a weak reference to its Python object, which PyTorch keeps for as long as the storage
    itself lives, whoever holds it.

    Args:
        granularity (`int`, *optional*, defaults to 1):
            Bytes of a storage are rounded up to a multiple of this.
        ignored ([`LiveStorages`], *optional*):
            Storages that do not count here while they live.

    Attributes:
        bytes (`int`): Bytes alive now; the sum over `by_label`.
        peak_bytes (`int`): The largest value that `bytes` has had.
        by_label (`dict[Hashable, int]`): Bytes alive now, by what their storages are.
    """

    def __init__(self, granularity: int = 1, ignored: "LiveStorages | None" = None):
        self.bytes = self.peak_bytes = 0
        self.by_label: dict[Hashable, int] = {}
        self._granularity = granularity
        self._references: dict[int, weakref.ref] = {}
        self._labels: dict[int, Hashable] = {}
        self._ignored = {} if ignored is None else ignored._references

    def add(self, tensor: Tensor, label: Hashable = None) -> None:
        """Takes in the tensor's storage unless it is known already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._references or key in self._ignored:
            return
        size = self._size(storage)
        self._references[key] = weakref.ref(storage, partial(self._forget, key, size))
        self._labels[key] = label
        self.by_label[label] = self.by_label.get(label, 0) + size
        self.bytes += size
        if self.bytes > self.peak_bytes:
            self.peak_bytes = self.bytes

    def label(self, tensor: Tensor) -> Hashable:
        """What the tensor's storage is; `None` also if it is not known."""
        return self._labels.get(tensor.untyped_storage()._cdata)

    def relabel(self, tensor: Tensor, label: Hashable) -> None:
        """Takes in the tensor's storage, or says that a known one is something else now."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._labels:
            return self.add(tensor, label)
        size = self._size(storage)
        self.by_label[self._labels[key]] -= size
        self.by_label[label] = self.by_label.get(label, 0) + size
        self._labels[key] = label

    def _size(self, storage) -> int:
        return -(-storage.nbytes() // self._granularity) * self._granularity

    def _forget(self, key: int, size: int, reference: weakref.ref) -> None:
        del self._references[key]
        self.by_label[self._labels.pop(key)] -= size
        self.bytes -= size
