"""Frozen parameters never cost saved bytes, and layers below the first adapter cost nothing at all."""

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from hf_tokenseek import attach
from hf_tokenseek.memory import SavedActivations
from tests.peft.tiny_peft import SELECTS, lora, micro_batch

KV_BYTES = 2 * 2 * 8 * 4  # keys and values, two heads of 8, float32


def llama(layers: int = 3, intermediate: int = 80, vocabulary: int = 128) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def saved(model, length: int = 40, checkpointing: bool = False) -> tuple[int, int]:
    """Bytes that autograd keeps beside the model's parameters and buffers, and the selected rows."""
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    with attach(model.train(), seek=SELECTS) as handle:
        with SavedActivations(model) as counted:
            loss = model(**micro_batch(1, length)).loss
        assert loss.requires_grad
        return counted.bytes, handle.selection.shape[1]


def shapes(model, autocast: bool) -> set[torch.Size]:
    """Shapes of the tensors that autograd keeps and that are no parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = set()

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            found.add(tensor.shape)
        return tensor

    with (
        attach(model.train(), seek=SELECTS),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        model(**micro_batch(1, 40)).loss.backward()
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
def test_frozen_weights_of_the_head_and_the_embeddings_cost_nothing(checkpointing):
    """Ten times the vocabulary, the same bytes."""
    small, large = (get_peft_model(llama(vocabulary=v), lora()) for v in (128, 1280))
    assert saved(small, checkpointing=checkpointing) == saved(large, checkpointing=checkpointing)


def test_no_frozen_weight_is_kept_in_another_form():
    """Neither a copy nor a transposed, fused or sliced form: no saved tensor has the size of one."""
    # sizes that no count of rows times a width gives
    model = get_peft_model(llama(intermediate=101, vocabulary=157), lora(target_modules=["q_proj", "v_proj"]))
    frozen = {p.numel() for p in model.parameters() if not p.requires_grad and p.dim() == 2}
    assert not frozen & {shape.numel() for shape in shapes(model, autocast=False)}


def test_layers_below_the_first_adapter_cost_nothing():
    """Only the last layer has an adapter: three layers save what ten do."""
    few, many = (
        get_peft_model(llama(layers=n), lora(layers_to_transform=[n - 1], target_modules=["q_proj", "down_proj"]))
        for n in (3, 10)
    )
    assert saved(few) == saved(many)


def test_layers_above_cost_their_rows_and_the_keys_and_values():
    """Linear in the layers, and for each of them in rows and tokens."""
    costs = {n: saved(get_peft_model(llama(layers=n), lora()))[0] for n in (2, 3, 4)}
    assert costs[4] - costs[3] == costs[3] - costs[2] > 40 * KV_BYTES
    model = get_peft_model(llama(layers=3), lora())
    (short, few), (long, many) = saved(model, 40), saved(model, 80)
    slope = (long - short - 40 * 3 * KV_BYTES) / (many - few)
    floor = short - few * slope - 40 * 3 * KV_BYTES
    # what remains is the head's: hidden state, target, log-sum-exp and weight of the six loss rows
    assert floor == 6 * (32 * 4 + 8 + 4 + 4)
