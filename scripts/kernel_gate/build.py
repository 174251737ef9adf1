"""One compilation: what came out of the compiler, read from the machine code. Needs nothing but the triton package."""

import hashlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from tokenseek_kernels.compilation import Compilation, Target

DIVISIBLE_BY_16 = [["tt.divisibility", 16]]
INTEGERS = ("i32", "i64", "u32", "u64")
# HMMA, DMMA (sm_80, sm_120), HGMMA (sm_90: wgmma), UTCHMMA (sm_100: tcgen05)
NVIDIA_MATRIX = re.compile(r"\b[A-Z]+MMA\b")
NVIDIA_LOCAL_MEMORY = re.compile(r"\b(?:STL|LDL)\b")
AMD_MATRIX = re.compile(r"^\s+v_(?:mfma|smfmac|wmma)", re.MULTILINE)


@dataclass(frozen=True)
class Row:
    """
    One kernel, compiled for one target.

    Attributes:
        kernel (`str`), target (`str`), aligned (`bool`): what was compiled.
        matmul (`bool`): whether tensor-core instructions are asked for.
        registers (`int`): registers a thread (AMD: vector registers).
        stack (`int`): bytes of stack a thread.
        spills (`int`): loads and stores of spilled registers (AMD: spilled vector registers).
        shared (`int`): bytes of shared memory a block.
        matrix (`int`): tensor-core instructions in the code; counted only where they are asked for.
        error (`str`, *optional*): why it did not compile.
        code (`str`): fingerprint of what was compiled; see [`fingerprint`].
    """

    kernel: str
    target: str
    aligned: bool
    matmul: bool
    registers: int = 0
    stack: int = 0
    spills: int = 0
    shared: int = 0
    matrix: int = 0
    error: str | None = None
    code: str = ""

    @classmethod
    def of(cls, compilation: Compilation, target: Target, aligned: bool, **figures) -> "Row":
        """The row of a compilation, with the figures that are known."""
        code = fingerprint(compilation, target, aligned)
        return cls(compilation.name, target.name, aligned, compilation.matmul, code=code, **figures)

    @property
    def variant(self) -> str:
        """`"sm_90 aligned"`, `"sm_90 unaligned"`."""
        return f"{self.target} {'aligned' if self.aligned else 'unaligned'}"


def build(compilation: Compilation, target: Target, aligned: bool) -> Row:
    """Compiles and reads the code; a compiler error becomes the row's `error`."""
    try:
        compiled = _compile(compilation, target, aligned)
        figures = _read_amd(compiled) if target.backend == "hip" else _read_nvidia(compiled, compilation.matmul)
        figures["shared"] = compiled.metadata.shared
    # whatever a compiler raises belongs into the table, beside the other rows
    except Exception as error:
        message = str(error).strip().partition("\n")[0]
        figures = {"error": f"{type(error).__name__}: {message}"}
    return Row.of(compilation, target, aligned, **figures)


def fingerprint(compilation: Compilation, target: Target, aligned: bool) -> str:
    """
    Changes with whatever the compiler's result depends on, but for Triton's version: the source of the kernel and of
    all that it calls, types, constants, launch options, target, alignment.
    """
    parts = (
        compilation.kernel.cache_key,
        sorted(compilation.types.items()),
        sorted((name, str(value)) for name, value in compilation.constants.items()),
        (compilation.num_warps, compilation.num_stages, compilation.matmul, target, aligned),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def _compile(compilation: Compilation, target: Target, aligned: bool) -> CompiledKernel:
    kernel, types, constants = compilation.kernel, compilation.types, compilation.constants
    unknown = [name for name in kernel.arg_names if name not in types and name not in constants]
    if unknown:
        raise ValueError(f"`types` and `constants` leave out {unknown}")
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in kernel.arg_names},
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={(p.num,): DIVISIBLE_BY_16 for p in kernel.params if aligned and _is_specialized(p, types)},
    )
    options = {"num_warps": compilation.num_warps, "num_stages": compilation.num_stages}
    return triton.compile(source, target=GPUTarget(target.backend, target.arch, target.warp_size), options=options)


def _is_specialized(parameter, types: dict[str, str]) -> bool:
    """Whether a launch would tell the compiler that this argument is a multiple of 16."""
    kind = types.get(parameter.name, "constexpr")
    return (kind.startswith("*") or kind in INTEGERS) and not parameter.do_not_specialize


def _read_nvidia(compiled: CompiledKernel, matmul: bool) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _output_of(triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin)
        registers, stack = (int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
        # disassembling takes longer than compiling; a kernel that spills has a stack
        disassembled = matmul or stack > 0
        code = _output_of(triton.knobs.nvidia.nvdisasm.path, "-c", "-ndf", cubin) if disassembled else ""
    return {
        "registers": registers,
        "stack": stack,
        "spills": len(NVIDIA_LOCAL_MEMORY.findall(code)),
        "matrix": len(NVIDIA_MATRIX.findall(code)),
    }


def _read_amd(compiled: CompiledKernel) -> dict[str, int]:
    code = compiled.asm["amdgcn"]

    def figure(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", code)[1])

    return {
        "registers": figure("vgpr_count"),
        "stack": figure("private_segment_fixed_size"),
        "spills": figure("vgpr_spill_count"),
        "matrix": len(AMD_MATRIX.findall(code)),
    }


def _output_of(*command) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
