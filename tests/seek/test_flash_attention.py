"""
Models that were loaded with FlashAttention: TokenSeek and LeMo train them, everything else goes on using it.

The package needs a GPU; here its two functions are played by torch, and transformers is told that it is there.
"""

import pytest
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, modeling_flash_attention_utils

from hf_tokenseek import attach
from tests.seek.tiny_families import tiny_model

NAMES = ("flash_attention_2", "kernels-community/flash-attn2")
N = 24


@pytest.fixture
def flash(monkeypatch):
    """FlashAttention; tells how often it has run."""
    calls = []

    def dense(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)):
        calls.append(tuple(q.shape))
        heads = [states.transpose(1, 2) for states in (q, k, v)]
        return F.scaled_dot_product_attention(
            *heads, is_causal=causal and q.shape[1] > 1, scale=softmax_scale, enable_gqa=True
        ).transpose(1, 2)

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False):
        lengths = cu_seqlens_q.diff().tolist()
        assert lengths == cu_seqlens_k.diff().tolist()
        parts = zip(*(states.split(lengths) for states in (q, k, v)), strict=True)
        return torch.cat([dense(*(x[None] for x in part), 0.0, softmax_scale, causal)[0] for part in parts])

    def imports(implementation, *_, **__):
        if implementation not in NAMES:
            raise ValueError(f"no FlashAttention is called {implementation}")
        utils = modeling_flash_attention_utils
        return dense, varlen, None, utils._pad_input, utils._unpad_input

    # as loading a kernel of the hub does
    for registry in (AttentionInterface, AttentionMaskInterface):
        monkeypatch.setitem(registry._global_mapping, NAMES[1], registry._global_mapping[NAMES[0]])
    monkeypatch.setattr(modeling_flash_attention_utils, "_lazy_imports", imports)
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    monkeypatch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", lambda *_, **__: True)
    return calls


def model_with(implementation: str):
    model = tiny_model("llama").train()
    model.set_attn_implementation(implementation)
    assert model.config._attn_implementation == implementation
    return model


def batch(padded: bool) -> dict:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 100, (2, N), generator=generator)
    labels = ids.masked_fill(torch.arange(N) < 18, -100)
    if not padded:
        return {"input_ids": ids, "labels": labels}
    mask = torch.ones_like(ids)
    mask[1, N - 5 :] = 0
    return {"input_ids": ids, "labels": labels.masked_fill(mask == 0, -100), "attention_mask": mask}


def step(model, inputs):
    loss = model(**inputs).loss
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return loss.detach(), gradients


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "methods",
    [
        {"seek": {"context": 0.3}},
        # trained plainly, by FlashAttention itself
        {"seek": {"ratio": 1.0}},
        {"lemo": {"keep": 0.5, "block": 4, "dense_first": 1}},
        {"seek": {"context": 0.3}, "lemo": {"keep": 0.5, "block": 4, "dense_first": 1}},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
def test_trains_as_with_sdpa(flash, name, padded, checkpointing, methods):
    inputs, found = batch(padded), []
    for implementation in ("sdpa", name):
        model = model_with(implementation)
        if checkpointing:
            model.gradient_checkpointing_enable()
        with attach(model, **methods):
            found.append(step(model, inputs))
    (expected, gradients), (loss, others) = found
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for key, gradient in gradients.items():
        torch.testing.assert_close(others[key], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("padded", [False, True])
def test_the_plain_model_goes_on_using_it(flash, name, padded):
    """Evaluation and generation while attached, and everything after it."""
    model, inputs = model_with(name), batch(padded)
    ids = {"input_ids": inputs["input_ids"][:1, :9]}
    model.eval()
    expected = model(**inputs).logits, model.generate(**ids, max_new_tokens=4, do_sample=False)
    assert flash
    with attach(model, seek=True) as handle:
        assert "flash" not in model.config._attn_implementation and name in handle.report()
        for _ in range(2):
            flash.clear()
            found = model(**inputs).logits, model.generate(**ids, max_new_tokens=4, do_sample=False)
            assert flash and all(map(torch.equal, found, expected))
            model.train()
            step(model, inputs)
            model.eval()
    assert model.config._attn_implementation == name
    assert torch.equal(model(**inputs).logits, expected[0])
