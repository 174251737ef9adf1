"""A small but deep model for the tests of sparse tuning, and what a run with really frozen layers gives."""

from contextlib import nullcontext

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_tokenseek import attach
from hf_tokenseek.memory import SavedActivations

LAYERS = 6


SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "use_cache": False,
}


def deep_llama(dtype=torch.float64, layers=LAYERS) -> LlamaForCausalLM:
    """Always the same, in training mode."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=layers)).to(dtype).train()


def batch(rows=2, tokens=15, seed=0) -> dict:
    """The second sequence is padded on the right; the first third is a prompt."""
    ids = torch.randint(1, 128, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : tokens // 3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def layers_of(model) -> torch.nn.ModuleList:
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    return model.model.layers


def really_freeze(model, active) -> None:
    """What the gates have to look like from inside: every other layer's weights ask for no gradient."""
    for index, layer in enumerate(layers_of(model)):
        if index not in active:
            layer.requires_grad_(False)


def set_active(handle, active) -> None:
    """A period with these layers."""
    handle.history.append((handle.step, list(active)))
    handle._activate(list(active), [float(index in active) for index in handle.trained])


def step(model, inputs) -> tuple[torch.Tensor, dict, float]:
    """Loss, gradients by name, and saved MiB of one forward and backward."""
    model.zero_grad(set_to_none=True)
    with SavedActivations(model) as saved:
        loss = model(**inputs).loss
    mib = saved.mib
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, mib


def gated_step(model, inputs, active, ist=None, **methods):
    """[`step`] with these layers active."""
    with attach(model, ist={"policy": "random", **(ist or {})}, **methods) as handle:
        set_active(handle.ist, active)
        return step(model, inputs)


def frozen_step(model, inputs, active, **methods):
    """[`step`] with all other layers really frozen."""
    with attach(model, **methods) if methods else nullcontext():
        really_freeze(model, active)
        return step(model, inputs)


def assert_same_step(mine, theirs) -> None:
    assert torch.equal(mine[0], theirs[0])
    assert mine[1].keys() == theirs[1].keys() and mine[1]
    for name, grad in mine[1].items():
        assert torch.equal(grad, theirs[1][name]), name
    assert mine[2] == theirs[2]
