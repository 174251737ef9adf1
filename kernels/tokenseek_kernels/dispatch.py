"""Which implementation of an operation runs: chosen by the tensor's device, forced by `impl=`."""

import torch

IMPLEMENTATIONS = ("torch", "reference")


def resolve_impl(impl: str, tensor: torch.Tensor, allowed: tuple[str, ...] = IMPLEMENTATIONS) -> str:
    """
    Turns `impl` into the name of the implementation to run.

    Args:
        impl (`str`):
            `"auto"` or one of `allowed`.
        tensor (`torch.Tensor`):
            A tensor the operation works on; its device decides what `"auto"` means.
        allowed (`tuple[str, ...]`, *optional*, defaults to `("torch", "reference")`):
            The implementations this operation has.

    Raises:
        ValueError: `impl` is unknown.
    """
    if impl == "auto":
        return "triton" if "triton" in allowed and tensor.device.type in ("cuda", "xpu") else "torch"
    if impl not in allowed:
        raise ValueError(f"`impl` should be 'auto' or one of {list(allowed)}, got {impl!r}. Use impl='auto'.")
    return impl
