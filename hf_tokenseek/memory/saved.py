"""What autograd keeps for backward, counted while it is being saved."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .storages import LiveStorages


class SavedActivations:
    """
    Counts the bytes that autograd saves for backward inside the block, each storage once, and goes on following them
    after it. Parameters, and the model's buffers, are left out; a view counts with its whole storage, because that is
    what it keeps alive. Gradient checkpointing counts with what it really keeps.

    ```python
    with SavedActivations(model) as saved:
        loss = model(**batch).loss
    print(saved.mib)
    loss.backward()
    print(saved.bytes)  # what has outlived backward
    ```

    Nothing is kept alive and no result changes. Every entry starts at zero. The cost is about 13 us per saved tensor,
    forward and backward together, 5 of them PyTorch's own calls into Python: 15 ms of one CPU core for a step of a
    30-layer Llama of any width (1,153 saved tensors), or 0.2 % of one of SmolLM2-135M with 1,024 tokens on two cores.

    While hooks are set, autograd does not check that saved tensors are unchanged, and only the innermost hooks see a
    tensor: hooks that were active outside (activation offloading) do nothing inside the block, and what hooks inside
    it take away is not counted.

    Args:
        model (`nn.Module`, *optional*):
            Its buffers, and whatever shares a storage with its parameters, are no activations.
        seen (`Callable`, *optional*):
            Called with each tensor that is saved and counts.

    Attributes:
        bytes (`int`): Bytes alive now.
        peak_bytes (`int`): The largest value that `bytes` has had.
        mib (`float`): `bytes` in MiB.
        tensors (`int`): How often autograd has saved a tensor.
    """

    def __init__(self, model: nn.Module | None = None, seen: Callable[[Tensor], None] | None = None):
        self._ignored, self._seen = LiveStorages(), seen
        for tensor in () if model is None else (*model.parameters(), *model.buffers()):
            self._ignored.add(tensor)
        self._reset()

    @property
    def bytes(self) -> int:
        return self._storages.bytes

    @property
    def peak_bytes(self) -> int:
        return self._storages.peak_bytes

    @property
    def mib(self) -> float:
        return self.bytes / 2**20

    def __enter__(self) -> "SavedActivations":
        self._reset()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        # dropped, because hooks and counter would hold each other
        hooks, self._hooks = self._hooks, None
        hooks.__exit__(*error)

    def _reset(self) -> None:
        self._storages, self.tensors = LiveStorages(ignored=self._ignored), 0

    def _pack(self, tensor: Tensor) -> Tensor:
        self.tensors += 1
        if not is_parameter(tensor):
            self._storages.add(tensor)
            if self._seen is not None:
                self._seen(tensor)
        # an operator may save its own output: kept with its graph, the graph would keep itself alive
        return tensor if tensor.grad_fn is None else tensor.detach()


def is_parameter(tensor: Tensor) -> bool:
    """Whether it is one or a view of one, also of those that are not the model's: FSDP puts gathered ones in place."""
    root = tensor if tensor._base is None else tensor._base
    return root.grad_fn is None and isinstance(root, nn.Parameter)


def _unpack(tensor: Tensor) -> Tensor:
    return tensor


def top_hooks() -> tuple[Callable, Callable] | None:
    """The saved-tensor hooks that see tensors now, `(pack, unpack)`; new ones would switch them off."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def other_hooks_active() -> bool:
    """Whether saved-tensor hooks are set already, which counting would switch off."""
    return top_hooks() is not None
