"""Floating-point operations of a training step: counted, and those of the head by formula."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import PreTrainedConfig

from hf_tokenseek import LemoConfig
from tokenseek_kernels.custom_op import CustomOp

# torch's counter knows the GPU's names of fused attention only, and no product in place
UNKNOWN_TO_TORCH = {
    torch.ops.aten.addmm_: lambda total, a, b, **_: 2 * a[0] * a[1] * b[1],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}


class LookInside(TorchDispatchMode):
    """Runs the project's operators by their functions, so that a counter outside of the block sees what they do."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return CustomOp.bodies.get(func, func)(*args, **(kwargs or {}))


@contextmanager
def counted_flops() -> Iterator[FlopCounterMode]:
    """Counts what runs inside the block; on a GPU without what Triton's kernels do."""
    with FlopCounterMode(display=False, custom_mapping=UNKNOWN_TO_TORCH) as counter, LookInside():
        yield counter


def head_rows(n: int, keep: float = 1.0) -> int:
    """Rows that the head sees of `n` labelled tokens, of those in LeMo's kept blocks where it drops others."""
    block = LemoConfig.block
    blocks = -(-n // block)
    if keep < 1:
        blocks = max(LemoConfig.sinks + LemoConfig.recent, int(keep * blocks))
    # the last block, which is always kept, may be shorter, and the last token predicts none
    return blocks * block - (-n % block) - 1


def head_flops(config: PreTrainedConfig, rows: int) -> int:
    """Logits, logits again for the backward pass, and the gradient of the hidden states; the head is frozen."""
    return 3 * 2 * rows * config.hidden_size * config.vocab_size
