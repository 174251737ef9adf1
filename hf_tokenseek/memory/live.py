"""Every byte alive during a piece of training, on any device, real or fake."""

from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from tokenseek_kernels.custom_op import CustomOp

from .storages import LiveStorages

# The CUDA caching allocator hands out multiples of this.
ALLOCATION_BYTES = 512


class LiveMemory(TorchDispatchMode):
    """
    Counts live and peak bytes of all storages that operators return inside the block, rounded as the CUDA allocator
    does. Forward, backward, recomputation and the optimizer are all seen, and so are the temporaries inside of this
    library's own operators. Under `FakeTensorMode` the figures equal those of the real run, and no memory is needed.
    Not for every step: about 25 us per operator.

    ```python
    with LiveMemory(model, batch) as memory:
        model(**batch).loss.backward()
    print(memory.peak_bytes - memory.base_bytes, memory.peak_op)
    ```

    Args:
        roots (`nn.Module`, `torch.Tensor` or a nest of tensors, *optional*):
            What is alive before. A module stands for its parameters, their gradients and its buffers. A tensor from
            outside that is not named here counts from the first operator that returns it or a view of it.
        inside (`bool`, *optional*, defaults to `True`):
            Whether to look into this library's own operators.

    Attributes:
        bytes (`int`): Bytes alive now.
        peak_bytes (`int`): The largest value that `bytes` has had.
        base_bytes (`int`): Bytes of the roots.
        peak_op (`str`): The operator whose result made the peak, `"roots"` if none did.
        inside_bytes (`int`): The most that one of this library's operators took beyond its results.
    """

    def __init__(self, *roots: Any, inside: bool = True):
        super().__init__()
        self._bodies = CustomOp.bodies if inside else {}
        self._storages = LiveStorages(ALLOCATION_BYTES)
        for tensor in _tensors(roots):
            self._storages.add(tensor)
        self.base_bytes, self.inside_bytes = self.bytes, 0
        self._peak_op: Any = "roots"
        self._rises: dict[tuple, int] = {}

    @property
    def bytes(self) -> int:
        return self._storages.bytes

    @property
    def peak_bytes(self) -> int:
        return self._storages.peak_bytes

    @property
    def peak_op(self) -> str:
        return str(self._peak_op)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, body = kwargs or {}, self._bodies.get(func)
        before, peak, rise = self.bytes, self.peak_bytes, 0
        if body is None:
            result = func(*args, **kwargs)
        else:
            # layers are alike: the same call is looked into once
            call = (func, *((a.dtype, a.shape) if isinstance(a, Tensor) else str(a) for a in args))
            if call not in self._rises:
                result, self._rises[call] = self._look_inside(body, args, kwargs)
            else:
                result, rise = func(*args, **kwargs), self._rises[call]
        tensors = [tensor for tensor in tree_iter(result) if isinstance(tensor, Tensor)]
        if not tensors:
            return result
        for tensor in tensors:
            self._storages.add(tensor, self._label())
        self._storages.peak_bytes = max(self.peak_bytes, before + rise)
        if self.peak_bytes > peak:
            self._peak_op = func
        self._observe(func, max(0, before + rise - self.bytes))
        return result

    def _look_inside(self, body: Callable, args: tuple, kwargs: dict) -> tuple[Any, int]:
        """What the operator returns, and how far it was above what had been alive before."""
        before, overall = self.bytes, self.peak_bytes
        self._storages.peak_bytes = before
        # the mode alone: a subclass enters once
        TorchDispatchMode.__enter__(self)
        try:
            result = body(*args, **kwargs)
        finally:
            TorchDispatchMode.__exit__(self, None, None, None)
        rise = self.peak_bytes - before
        self.inside_bytes = max(self.inside_bytes, self.peak_bytes - self.bytes)
        self._storages.peak_bytes = max(overall, self.peak_bytes)
        return result, rise

    def _label(self) -> Hashable:
        """What a new storage is."""
        return None

    def _observe(self, func: Any, temporary_bytes: int) -> None:
        """Looks at what is alive after an operator, which had so many bytes more while it ran."""


def _tensors(roots: Any):
    for leaf in tree_iter(roots):
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, nn.Module):
            yield from leaf.buffers()
            for parameter in leaf.parameters():
                yield parameter
                if parameter.grad is not None:
                    yield parameter.grad
