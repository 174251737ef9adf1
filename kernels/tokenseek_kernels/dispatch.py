"""Which implementation of an operation runs: chosen by the tensor's device, forced by `impl=`."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

IMPLEMENTATIONS = ("triton", "torch", "reference")
TRITON_DEVICES = ("cuda", "xpu")

_planning = False


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Inside the block `"auto"` means what it means on a GPU, for fake tensors: nothing runs, only shapes count."""
    global _planning
    before, _planning = _planning, True
    try:
        yield
    finally:
        _planning = before


def is_on_gpu(tensor: torch.Tensor) -> bool:
    """Whether the tensor lies where Triton runs, or would if it were real, see [`as_on_a_gpu`]."""
    return _planning or tensor.device.type in TRITON_DEVICES


def resolve_impl(impl: str, tensor: torch.Tensor, allowed: tuple[str, ...] = IMPLEMENTATIONS) -> str:
    """
    Turns `impl` into the name of the implementation to run.

    Args:
        impl (`str`):
            `"auto"` or one of `allowed`.
        tensor (`torch.Tensor`):
            A tensor the operation works on; its device decides what `"auto"` means, and whether Triton can run.
        allowed (`tuple[str, ...]`, *optional*, defaults to `("triton", "torch", "reference")`):
            The implementations this operation has.

    Raises:
        ValueError: `impl` is unknown, or it is `"triton"` and Triton cannot run on the tensor's device.
    """
    on_gpu = is_on_gpu(tensor)
    if impl == "auto":
        return "triton" if on_gpu and "triton" in allowed else "torch"
    if impl not in allowed:
        raise ValueError(f"`impl` should be 'auto' or one of {list(allowed)}, got {impl!r}. Use impl='auto'.")
    if impl == "triton" and not on_gpu and not is_interpreting():
        raise ValueError(
            f"impl='triton' needs a tensor on one of {list(TRITON_DEVICES)}, got one on {tensor.device.type!r}. Use "
            "impl='auto', or set TRITON_INTERPRET=1 before Python starts to run the kernels in Triton's interpreter."
        )
    return impl


def resolve_up_to(widest: int, impl: str, tensor: torch.Tensor, features: int) -> str:
    """[`resolve_impl`] where Triton's programs hold `features` in registers, `widest` at most; torch takes more."""
    if features <= widest:
        return resolve_impl(impl, tensor)
    if impl == "triton":
        raise ValueError(f"impl='triton' takes up to {widest} features, got {features}. Use impl='auto'.")
    return resolve_impl(impl, tensor, ("torch", "reference"))


def is_interpreting() -> bool:
    """Whether Triton is imported and runs its kernels in the interpreter, on CPU tensors."""
    triton = sys.modules.get("triton")
    if triton is None:
        try:
            import triton
        except ImportError:
            return False
    return bool(triton.knobs.runtime.interpret)
