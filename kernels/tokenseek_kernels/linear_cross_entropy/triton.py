"""What is made of one chunk of logits, in Triton: the functions of `logits.py`.

The product is the vendor's, in the dtype of its factors. A kernel then reads the chunk as it is, computes in registers
in the compute dtype and, where a gradient is wanted, writes it over the logits: no second chunk exists.
"""

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenseek_kernels.compilation import Compilation, Target
from tokenseek_kernels.linear_cross_entropy.logits import compute_dtype

# A product over a chunk of r rows does r FLOP a byte of the 16-bit weight; an H100 could do 300 in that time.
# This makes 523 rows of 128k classes.
CHUNK_BYTES = 128 * 2**20
LOSS_WARPS, LOSS_STAGES = 8, 4
GRADIENT_BLOCK, GRADIENT_WARPS = 1024, 4

# Stands for "no logit": it weighs nothing, and unlike that of -inf its arithmetic stays finite.
LOWEST = tl.constexpr(-1e15)
TRITON_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}


def chunk_elements(hidden: Tensor) -> int:
    """Logits held at once by default: 128 MiB in the dtype of `hidden`."""
    return CHUNK_BYTES // hidden.dtype.itemsize


def cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, classes: Tensor, logit_scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp of each row. The chunk is read once."""
    logits = hidden @ weight.T
    loss, log_sum_exp, _ = _launch_loss(logits, bias, classes, logit_scale, softcap, entropy=False)
    return loss, log_sum_exp


def grad_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    first_column: int,
    log_sum_exp: Tensor,
    coefficient: Tensor,
    logit_scale: float,
    softcap: float | None,
) -> Tensor:
    """
    `coefficient * dloss/dz` in the dtype of `hidden`, for the columns from `first_column` on, to which `weight` and
    `bias` belong. The chunk is read once and written once.
    """
    logits = hidden @ weight.T
    _launch_gradient(logits, bias, targets, first_column, log_sum_exp, coefficient, logit_scale, softcap)
    return logits


def statistics(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, classes: Tensor, logit_scale: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and entropy of each row, and dloss/dz in the dtype of `hidden`. The chunk is read twice, written once."""
    logits = hidden @ weight.T
    loss, log_sum_exp, entropy = _launch_loss(logits, bias, classes, logit_scale, softcap, entropy=True)
    _launch_gradient(logits, bias, classes, 0, log_sum_exp, torch.ones_like(loss), logit_scale, softcap)
    return loss, entropy, logits


def _launch_loss(
    logits: Tensor, bias: Tensor | None, classes: Tensor, logit_scale: float, softcap: float | None, entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    rows, columns = logits.shape
    loss = logits.new_empty(rows, dtype=compute_dtype(logits))
    log_sum_exp = torch.empty_like(loss)
    entropies = torch.empty_like(loss) if entropy else None
    _loss_kernel[(rows,)](
        p_logits=logits,
        p_bias=None if bias is None else bias.contiguous(),
        p_classes=classes.contiguous(),
        p_loss=loss,
        p_log_sum_exp=log_sum_exp,
        p_entropy=entropies,
        n_columns=columns,
        LOGIT_SCALE=logit_scale,
        SOFTCAP=softcap,
        BLOCK=_loss_block(logits.dtype),
        STAGES=LOSS_STAGES,
        num_warps=LOSS_WARPS,
    )
    return loss, log_sum_exp, entropies


def _launch_gradient(
    logits: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    first_column: int,
    log_sum_exp: Tensor,
    coefficient: Tensor,
    logit_scale: float,
    softcap: float | None,
) -> None:
    rows, columns = logits.shape
    _gradient_kernel[(rows, triton.cdiv(columns, GRADIENT_BLOCK))](
        p_logits=logits,
        p_bias=None if bias is None else bias.contiguous(),
        p_targets=targets.contiguous(),
        p_log_sum_exp=log_sum_exp.contiguous(),
        p_coefficient=coefficient.contiguous(),
        first_column=first_column,
        n_columns=columns,
        LOGIT_SCALE=logit_scale,
        SOFTCAP=softcap,
        BLOCK=GRADIENT_BLOCK,
        num_warps=GRADIENT_WARPS,
    )


def _loss_block(dtype: torch.dtype) -> int:
    """Columns a step; wider in 16 bits only, where a thread's 16 bytes are 8 logits."""
    return {2: 2048, 4: 1024, 8: 512}[dtype.itemsize]


@triton.jit
def _load_logits(p_row, p_bias, columns, inside, LOGIT_SCALE: tl.constexpr, SOFTCAP: tl.constexpr, ACC: tl.constexpr):
    """softcap * tanh(scale * (product + bias) / softcap) at some columns of a row, LOWEST where not inside."""
    logits = tl.load(p_row + columns, mask=inside, other=0.0).to(ACC)
    if p_bias is not None:
        logits += tl.load(p_bias + columns, mask=inside, other=0.0).to(ACC)
    logits *= LOGIT_SCALE
    if SOFTCAP is not None:
        # tanh(x) = 2 sigmoid(2x) - 1
        logits = SOFTCAP * (2.0 * tl.sigmoid(logits * (2.0 / SOFTCAP)) - 1.0)
    # LOWEST too for a class that a logit of -inf forbids; NaN is not below and stays
    return tl.where(inside & ~(logits < LOWEST), logits, LOWEST)


@triton.jit
def _add_logits(logits, top, total, moment):
    """
    Adds a logit l to each lane's own online softmax, with one exponential and no lane waiting for another:

        top = max l,   total = sum exp(l - top),   moment = sum exp(l - top) (l - top)
    """
    rise = logits - top
    shrink = tl.exp(-tl.abs(rise))
    higher = rise > 0
    moment = tl.where(higher, shrink * (moment - total * rise), moment + shrink * rise)
    total = tl.where(higher, total * shrink + 1.0, total + shrink)
    return tl.where(higher, logits, top), total, moment


@triton.jit
def _grad_loss(logits, log_sum_exp, is_target, SOFTCAP: tl.constexpr):
    """dloss/dz = (exp(l - lse) - onehot) * (1 - (l / softcap)^2)"""
    gradient = tl.exp(logits - log_sum_exp) - tl.where(is_target, 1.0, 0.0)
    if SOFTCAP is not None:
        slope = 1.0 - (logits / SOFTCAP) * (logits / SOFTCAP)
        gradient *= slope
    return gradient


@triton.jit
def _loss_kernel(
    p_logits,
    p_bias,
    p_classes,
    p_loss,
    p_log_sum_exp,
    p_entropy,
    n_columns,
    LOGIT_SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One row a program: loss and log-sum-exp, with `p_entropy` also the entropy."""
    ACC: tl.constexpr = p_loss.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    p_row = p_logits + row * n_columns
    target = tl.load(p_classes + row)
    known = (target >= 0) & (target < n_columns)
    target_logit = _load_logits(p_row, p_bias, target, known, LOGIT_SCALE, SOFTCAP, ACC)

    top = tl.full((BLOCK,), LOWEST, ACC)
    total = tl.zeros((BLOCK,), ACC)
    moment = tl.zeros((BLOCK,), ACC)
    for start in tl.range(0, n_columns, BLOCK, num_stages=STAGES):
        columns = start + tl.arange(0, BLOCK)
        logits = _load_logits(p_row, p_bias, columns, columns < n_columns, LOGIT_SCALE, SOFTCAP, ACC)
        top, total, moment = _add_logits(logits, top, total, moment)

    # the lanes' sums, brought to the row's top
    row_top = tl.max(top, 0)
    shrink = tl.exp(top - row_top)
    row_total = tl.sum(total * shrink, 0)
    log_total = tl.log(row_total)
    # a class out of range is a mistake of the caller's and must not pass for a loss
    loss = tl.where(known, log_total + (row_top - target_logit), float("nan"))
    tl.store(p_loss + row, loss)
    tl.store(p_log_sum_exp + row, row_top + log_total)

    if p_entropy is not None:
        row_moment = tl.sum(shrink * (moment + total * (top - row_top)), 0)
        tl.store(p_entropy + row, log_total - row_moment / row_total)


@triton.jit(do_not_specialize=["first_column"])
def _gradient_kernel(
    p_logits,
    p_bias,
    p_targets,
    p_log_sum_exp,
    p_coefficient,
    first_column,
    n_columns,
    LOGIT_SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of columns of one row a program: coefficient * dloss/dz over the logits."""
    ACC: tl.constexpr = p_log_sum_exp.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    p_row = p_logits + row * n_columns
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < n_columns
    is_target = inside & (columns == tl.load(p_targets + row) - first_column)
    logits = _load_logits(p_row, p_bias, columns, inside, LOGIT_SCALE, SOFTCAP, ACC)
    gradient = _grad_loss(logits, tl.load(p_log_sum_exp + row), is_target, SOFTCAP) * tl.load(p_coefficient + row)
    tl.store(p_row + columns, gradient.to(p_logits.dtype.element_ty), mask=inside)


def compilations(target: Target) -> list[Compilation]:
    """Each kernel in each dtype, with every option on and with every option off."""
    cases = itertools.product(TRITON_TYPES, (30.0, None), ("loss", "loss and entropy", "gradient"))
    return [_compilation(name, dtype, softcap) for dtype, softcap, name in cases]


def _compilation(name: str, dtype: torch.dtype, softcap: float | None) -> Compilation:
    held, acc = (f"*{TRITON_TYPES[t]}" for t in (dtype, torch.promote_types(dtype, torch.float32)))
    options = softcap is not None
    arguments = {"p_logits": held, "p_bias": held if options else None, "p_log_sum_exp": acc, "n_columns": "i32"}
    constants = {"LOGIT_SCALE": 0.5 if options else 1.0, "SOFTCAP": softcap}
    if name == "gradient":
        kernel, warps, stages = _gradient_kernel, GRADIENT_WARPS, 1
        arguments |= {"p_targets": "*i64", "p_coefficient": acc, "first_column": "i32"}
        constants |= {"BLOCK": GRADIENT_BLOCK}
    else:
        kernel, warps, stages = _loss_kernel, LOSS_WARPS, LOSS_STAGES
        arguments |= {"p_classes": "*i64", "p_loss": acc, "p_entropy": acc if name == "loss and entropy" else None}
        constants |= {"BLOCK": _loss_block(dtype), "STAGES": LOSS_STAGES}
    types = {argument: kind for argument, kind in arguments.items() if kind is not None}
    constants |= dict.fromkeys(arguments.keys() - types.keys())
    label = f"linear_cross_entropy {name} {TRITON_TYPES[dtype]}{' bias softcap' if options else ''}"
    return Compilation(label, kernel, types, constants, warps, stages, matmul=False)
