"""GPU targets, and one kernel in one configuration that a launch on them may need: what the compile gate builds."""

import functools
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Target:
    """
    A GPU architecture as far as kernels care.

    Attributes:
        name (`str`): `"sm_90"`, `"gfx942"`, ...
        backend (`str`): `"cuda"` or `"hip"`.
        arch (`int` or `str`): what Triton calls it, 90 or `"gfx942"`.
        warp_size (`int`): threads a warp.
        shared_memory (`int`): bytes of shared memory one block may use.
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_memory: int


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 166_912),
        Target("sm_90", "cuda", 90, 32, 232_448),
        Target("sm_100", "cuda", 100, 32, 232_448),
        Target("sm_120", "cuda", 120, 32, 101_376),
        Target("gfx942", "hip", "gfx942", 64, 65_536),
    )
}


@dataclass(frozen=True)
class Compilation:
    """
    One kernel with one configuration, compiled without a GPU.

    Attributes:
        name (`str`): what the gate's table calls it, such as `"selected_attention forward bf16 dim 64"`.
        kernel (`triton.JITFunction`): the kernel.
        types (`dict[str, str]`): type of each run-time argument: `"*bf16"`, `"i32"`, `"fp32"`.
        constants (`dict[str, Any]`): value of each `tl.constexpr`, and `None` for a pointer that is not given.
        num_warps (`int`), num_stages (`int`): the launch's.
        matmul (`bool`): whether it has to come out with tensor-core instructions.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    matmul: bool


def target_of(tensor: torch.Tensor) -> Target:
    """The target of the tensor's device. A CPU tensor (the interpreter) gets that of the A100."""
    if tensor.device.type != "cuda":
        return TARGETS["sm_80"]
    return _target_of_device(tensor.device)


@functools.cache
def _target_of_device(device: torch.device) -> Target:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
        return TARGETS.get(arch) or Target(arch, "hip", arch, 64, 65_536)
    arch = 10 * properties.major + properties.minor
    limit = properties.shared_memory_per_block_optin
    return Target(f"sm_{arch}", "cuda", arch, 32, limit)
