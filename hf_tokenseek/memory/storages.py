"""Counting bytes by storage, without keeping any storage alive."""

import weakref
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
        bytes (`int`): Bytes alive now.
        peak_bytes (`int`): The largest value that `bytes` has had.
    """

    def __init__(self, granularity: int = 1, ignored: "LiveStorages | None" = None):
        self.bytes = self.peak_bytes = 0
        self._granularity = granularity
        self._references: dict[int, weakref.ref] = {}
        self._ignored = {} if ignored is None else ignored._references

    def add(self, tensor: Tensor) -> None:
        """Takes in the tensor's storage unless it is known already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._references or key in self._ignored:
            return
        size = -(-storage.nbytes() // self._granularity) * self._granularity
        self._references[key] = weakref.ref(storage, partial(self._forget, key, size))
        self.bytes += size
        if self.bytes > self.peak_bytes:
            self.peak_bytes = self.bytes

    def _forget(self, key: int, size: int, reference: weakref.ref) -> None:
        del self._references[key]
        self.bytes -= size
