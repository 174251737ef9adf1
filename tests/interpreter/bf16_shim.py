"""
bfloat16 arithmetic in Triton's interpreter, which otherwise computes on the raw bits without a word.

The interpreter keeps bfloat16 values as uint16 and hands them to numpy as they are: `a + b` adds bit patterns, and a
cast from float32 truncates. With the shim every float operation that meets a bfloat16 operand runs on float32 copies
and rounds its result once, to nearest even, as a GPU does; `tl.dot` accumulates in the dtype of its accumulator.
Reductions and scans stay in float32 until their end, where a GPU may round after every step.

Works with the interpreter of Triton 3.7 to 3.9.
"""

import functools

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceScanOpInterface, TensorHandle

# What the builder does with float values beyond moving them; Triton 3.7 and 3.8 lack some.
COMPARISONS = tuple(f"create_fcmp{order}{test}" for order in "OU" for test in ("EQ", "NE", "LT", "LE", "GT", "GE"))
ARITHMETIC = (
    *("create_fadd", "create_fsub", "create_fmul", "create_fdiv", "create_frem", "create_fneg", "create_fma"),
    *("create_precise_divf", "create_approx_divf", "create_clampf"),
    *("create_minimumf", "create_minnumf", "create_maximumf", "create_maxnumf"),
    *("create_exp", "create_exp2", "create_log", "create_log2", "create_sin", "create_cos", "create_erf"),
    *("create_sqrt", "create_precise_sqrt", "create_rsqrt", "create_floor", "create_ceil"),
)
ACCUMULATOR = 2  # the operand of `create_dot` whose dtype the result has


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits -> float32 values, exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """Float values -> bfloat16 bits, rounded to nearest even; a NaN stays one."""
    values = np.ascontiguousarray(values, np.float32).reshape(np.shape(values))
    bits = values.view(np.uint32)
    high, to_even = bits >> np.uint32(16), np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    rounded = (bits + to_even) >> np.uint32(16)
    return np.where(np.isnan(values), high | np.uint32(0x40), rounded).astype(np.uint16)


@functools.cache
def install() -> None:
    """Patches the interpreter of this process, once and for good."""
    for name in (*COMPARISONS, *ARITHMETIC):
        if hasattr(InterpreterBuilder, name):
            setattr(InterpreterBuilder, name, _in_float32(getattr(InterpreterBuilder, name)))
    InterpreterBuilder.create_dot = _in_float32(InterpreterBuilder.create_dot, result_like=ACCUMULATOR)
    InterpreterBuilder.get_bf16 = lambda builder, number: TensorHandle(narrow(np.array([number])), tl.bfloat16)
    InterpreterBuilder.cast_impl = _rounding_cast(InterpreterBuilder.cast_impl)
    ReduceScanOpInterface.apply = _reducing_in_float32(ReduceScanOpInterface.apply)


def _is_bfloat16(operand) -> bool:
    return isinstance(operand, TensorHandle) and operand.dtype.scalar == tl.bfloat16


def _in_float32(operation, result_like: int = 0):
    @functools.wraps(operation)
    def widened(builder, *operands):
        if not any(map(_is_bfloat16, operands)):
            return operation(builder, *operands)
        wide = (TensorHandle(widen(o.data), tl.float32) if _is_bfloat16(o) else o for o in operands)
        result = operation(builder, *wide)
        # the interpreter gives comparisons the dtype of their operands, their values are truth values
        if result.data.dtype == np.bool_ or not _is_bfloat16(operands[result_like]):
            return result
        return TensorHandle(narrow(result.data), tl.bfloat16)

    return widened


def _rounding_cast(cast):
    @functools.wraps(cast)
    def rounding(builder, source, dtype):
        if _is_bfloat16(source) == (dtype.scalar == tl.bfloat16):
            return cast(builder, source, dtype)
        if _is_bfloat16(source):
            return TensorHandle(widen(source.data).astype(interpreter._get_np_dtype(dtype.scalar)), dtype.scalar)
        return TensorHandle(narrow(source.data), tl.bfloat16)

    return rounding


def _reducing_in_float32(apply):
    @functools.wraps(apply)
    def widened(reduction, inputs):
        if not isinstance(inputs, tuple):
            return widened(reduction, (inputs,))[0]
        was_bfloat16 = [tensor.dtype == tl.bfloat16 for tensor in inputs]
        wide = (_retyped(x, tl.float32, widen) if x.dtype == tl.bfloat16 else x for x in inputs)
        # a reduction may return fewer tensors than it reads
        results = zip(apply(reduction, tuple(wide)), was_bfloat16, strict=False)
        return tuple(_retyped(x, tl.bfloat16, narrow) if bf16 else x for x, bf16 in results)

    return widened


def _retyped(tensor: tl.tensor, dtype: tl.dtype, convert) -> tl.tensor:
    shaped = tl.block_type(dtype, tensor.shape) if tensor.shape else dtype
    return tl.tensor(TensorHandle(convert(tensor.handle.data), dtype), shaped)
