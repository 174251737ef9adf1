"""QLoRA's frozen weights: NF4 with double quantisation, by bitsandbytes, with data and without."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

# of bitsandbytes' default: weights that share a scale, scales that share a second one
BLOCK, SECOND_BLOCK = 64, 256


def in_4bit(model: nn.Module) -> nn.Module:
    """
    The model with the weights of all linear layers but the head in 4 bits, as `load_in_4bit` loads it.

    Args:
        model (`transformers.PreTrainedModel`): on the meta device, where nothing is computed, or on the CPU.

    Raises:
        ModuleNotFoundError: bitsandbytes is not installed.
    """
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "`load_in_4bit` needs the package `bitsandbytes`. Run `pip install bitsandbytes`."
        ) from None
    kind, head = {"compress_statistics": True, "quant_type": "nf4"}, model.get_output_embeddings()
    layers = [(name, m) for name, m in model.named_modules() if type(m) in (nn.Linear, Conv1D) and m is not head]
    for name, module in layers:
        weight = module.weight.data.t().contiguous() if type(module) is Conv1D else module.weight.data
        layer = Linear4bit(*weight.shape[::-1], module.bias is not None, torch.bfloat16, **kind)
        layer.weight, layer.bias = Params4bit(weight, requires_grad=False, **kind), module.bias
        # the move quantises
        model.set_submodule(name, layer.to(module.weight.device).train(module.training))
    # PEFT asks for it
    model.is_loaded_in_4bit = True
    return model


def is_4bit(tensor: Tensor) -> bool:
    """Whether it is a weight of a layer of [`in_4bit`]."""
    return hasattr(tensor, "quant_state")


def fake_4bit(weight: nn.Parameter) -> nn.Parameter:
    """What quantising makes of a weight that is still on the meta device, without data; call it in a fake mode."""
    from bitsandbytes.functional import QuantState

    blocks = -(-weight.numel() // BLOCK)
    scales = QuantState(
        absmax=torch.empty(-(-blocks // SECOND_BLOCK)),
        code=torch.empty(256),
        blocksize=SECOND_BLOCK,
        dtype=torch.float32,
    )
    packed = nn.Parameter(torch.empty((weight.numel() + 1) // 2, 1, dtype=torch.uint8), requires_grad=False)
    packed.quant_state = QuantState(
        absmax=torch.empty(blocks, dtype=torch.uint8),
        shape=weight.shape,
        code=torch.empty(16),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=weight.dtype,
        offset=torch.empty(()),
        state2=scales,
    )
    packed.bnb_quantized = True
    return packed


def scales_of(weight: nn.Parameter) -> Iterator[Tensor]:
    """What a 4-bit weight has beside its packed numbers; nothing for any other."""
    state = getattr(weight, "quant_state", None)
    while state is not None:
        yield from (value for value in vars(state).values() if isinstance(value, Tensor))
        state = state.state2


def weights_of(weight: nn.Parameter) -> int:
    """How many weights it holds, packed or not."""
    state = getattr(weight, "quant_state", None)
    return weight.numel() if state is None else state.shape.numel()
