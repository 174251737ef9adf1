"""Lean layers in real transformers and PEFT modules: same loss, same gradients, fewer saved bytes."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_tokenseek import SeekConfig, attach
from hf_tokenseek.memory import SavedActivations
from tests.seek.tiny_families import tiny_model

# one of each norm convention and MLP form that transformers has
FAMILIES = ["llama", "qwen3", "gemma2", "gemma3_text", "olmo2", "olmo", "cohere", "phi3", "glm4", "phi", "gpt_neox"]


def batch_for(model, rows=2, length=11):
    torch.manual_seed(1)
    ids = torch.randint(3, model.config.get_text_config().vocab_size, (rows, length))
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.4, -100)
    return {"input_ids": ids, "labels": labels}


def step(model, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(2)
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def saved_bytes(model, batch) -> int:
    with SavedActivations(model) as saved:
        loss = model(**batch, use_cache=False).loss
    # a graph that nobody holds keeps nothing
    return saved.bytes if loss.requires_grad else 0


def assert_same(found, truth, tolerance):
    assert found[1].keys() == truth[1].keys()
    torch.testing.assert_close(found[0], truth[0], rtol=tolerance, atol=0)
    # rounding is relative to what is added up; where sums cancel, as in a softmax gradient, that is more than what
    # comes out: with the floor, 1e-5 allows one float32 epsilon of the largest gradient
    largest = max(gradient.abs().max() for gradient in truth[1].values())
    for name, gradient in truth[1].items():
        scale = gradient.abs().max().clamp(min=1e-2 * largest)
        assert (found[1][name] - gradient).abs().max() / scale < tolerance, name


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_plain_model_and_saves_less(family):
    model = tiny_model(family)
    batch = batch_for(model)
    truth, before = step(model, batch), saved_bytes(model, batch)
    with attach(model, lean=True) as handle:
        assert handle.lean.swaps and not handle.lean.left_alone
        assert_same(step(model, batch), truth, 2e-5)
        assert saved_bytes(model, batch) < 0.95 * before
    assert_same(step(model, batch), truth, 1e-9)
    assert saved_bytes(model, batch) == before


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_gradient_checkpointing(tiny_llama, reentrant):
    model = tiny_llama()
    batch = batch_for(model)
    truth = step(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    before = saved_bytes(model, batch)
    with attach(model, lean=True):
        assert_same(step(model, batch), truth, 1e-5)
        # what lives between two layers is the checkpoint's, the last norm alone is ours
        assert saved_bytes(model, batch) <= before


def test_with_tokenseek_exact_setting_equals_plain_training(tiny_llama):
    model = tiny_llama()
    batch = batch_for(model)
    truth = step(model, batch)
    with attach(model, seek=SeekConfig(ratio=1.0, plain_fallback=False), lean=True):
        assert_same(step(model, batch), truth, 1e-5)


def test_with_tokenseek_equals_tokenseek_and_saves_less(tiny_llama):
    model = tiny_llama()
    batch = batch_for(model, 1, 64)
    config = SeekConfig(ratio=0.25, score="recent", plain_fallback=False)
    with attach(model, seek=config):
        truth, before = step(model, batch), saved_bytes(model, batch)
    with attach(model, seek=config, lean=True):
        assert_same(step(model, batch), truth, 1e-5)
        assert saved_bytes(model, batch) < before


def test_saved_bytes_of_a_llama_layer_by_formula():
    # bfloat16, H wide, I inside: per token two norms 2 H + 4 each (6 H + 4 before), normed inputs of attention and
    # MLP 2 H each, gate and up 2 I each (activation and product 2 I each before), queries, keys, values and attention
    # output with its log-sum-exp as they are
    hidden, inner, tokens = 32, 96, 40
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16).train()
    layer = model.model.layers[0]
    x = torch.randn(1, tokens, hidden, dtype=torch.bfloat16, requires_grad=True)
    positions = model.model.rotary_emb(x, torch.arange(tokens)[None])

    def saved() -> int:
        with SavedActivations(model) as found:
            output = layer(x, position_embeddings=positions)
        return found.bytes if output.requires_grad else 0

    before = saved()
    with attach(model, lean=True):
        after = saved()
    # before, x itself was not kept: its float32 copy was
    norms = 2 * (6 * hidden + 4) - 2 * (2 * hidden + 4)
    assert before - after == tokens * (norms + 2 * 2 * inner)


def test_bfloat16_is_as_near_to_the_truth_as_the_plain_model():
    model = tiny_model("llama")
    batch = batch_for(model)
    truth = step(copy.deepcopy(model).double(), batch)
    model = model.to(torch.bfloat16)
    plain = step(model, batch)
    with attach(model, lean=True):
        lean = step(model, batch)

    def error(found):
        return max(float((g.double() - truth[1][n]).norm() / truth[1][n].norm()) for n, g in found[1].items())

    assert error(lean) < 1.5 * error(plain)


def test_state_dict_copies_and_types_stay_as_they_are(tiny_llama):
    model = tiny_llama()
    names, norm = list(model.state_dict()), type(model.model.norm)
    with attach(model, lean=True):
        assert list(model.state_dict()) == names
        assert isinstance(model.model.norm, norm)
        twin = copy.deepcopy(model)
        batch = batch_for(model)
        assert_same(step(twin, batch), step(model, batch), 1e-9)
    assert type(model.model.norm) is norm


def test_the_table_shows_formulas_and_what_was_left_alone(tiny_llama):
    model = tiny_llama()
    with attach(model, lean=True) as handle:
        table = handle.report()
    # float32: the input and its normalised copy, 4 H each, and the root; then the input and the root
    table = " ".join(table.split())
    assert "norm LlamaRMSNorm 7 x 8 H + 4 -> 4 H + 4" in table
    assert "MLP LlamaMLP 3 x 4 H + 16 I -> 4 H + 8 I" in table


def test_a_module_that_computes_something_else_stays_plain(tiny_llama):
    class OtherNorm(type(tiny_llama().model.norm)):
        def forward(self, hidden_states):
            return super().forward(hidden_states) * 1.01

    model = tiny_llama()
    model.model.norm.__class__ = OtherNorm
    batch = batch_for(model)
    truth = step(model, batch)
    with attach(model, lean=True) as handle:
        assert handle.lean.left_alone == {"OtherNorm": 1}
        assert "left alone, as no lean form computes the same: 1 x OtherNorm" in handle.report()
        assert_same(step(model, batch), truth, 1e-5)


def test_hooks_on_the_down_projection_still_run(tiny_llama):
    model = tiny_llama()
    batch = batch_for(model)
    truth, seen = step(model, batch), []
    model.model.layers[1].mlp.down_proj.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    with attach(model, lean=True):
        assert_same(step(model, batch), truth, 1e-5)
    assert len(seen) == 1


def test_refusals(tiny_llama):
    with pytest.raises(ValueError, match="finds nothing to swap in Linear"):
        attach(nn.Linear(2, 2), lean=True)
    model = tiny_llama()
    with attach(model, lean=True), pytest.raises(ValueError, match="lean already"):
        attach(model, lean=True)
    with pytest.raises(ValueError, match="lean=True"):
        attach(model)


def lora(model, **options):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **options))
    return model.train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_shares_one_input(tiny_llama, dtype):
    model = lora(tiny_llama().to(dtype))
    batch = batch_for(model.base_model.model)
    truth, before = step(model, batch), saved_bytes(model, batch)
    with attach(model, lean=True):
        assert_same(step(model, batch), truth, 1e-5 if dtype == torch.float32 else 5e-2)
        after = saved_bytes(model, batch)
    # PEFT keeps float32 adapters over a bfloat16 base, and with them a float32 copy of each input a layer
    assert after < (0.8 if dtype == torch.float32 else 0.6) * before


def test_lora_dropout_has_the_same_mask_in_forward_and_backward(tiny_llama):
    model = lora(tiny_llama(), lora_dropout=0.5).double()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 32, dtype=torch.float64, requires_grad=True)

    def output(x):
        torch.manual_seed(7)
        return layer(x)

    with attach(model, lean=True):
        torch.autograd.gradcheck(output, (x,))
        different = not torch.equal(layer(x), layer(x))
    assert different


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}, {"use_rslora": True}])
def test_lora_variants(tiny_llama, options):
    model = lora(tiny_llama(), **options)
    batch = batch_for(model.base_model.model)
    truth = step(model, batch)
    with attach(model, lean=True):
        assert_same(step(model, batch), truth, 1e-5)


def test_lora_disabled_and_merged_adapters(tiny_llama):
    model = lora(tiny_llama())
    batch = batch_for(model.base_model.model)
    with torch.no_grad():
        adapted = model(**batch).loss
        with model.disable_adapter():
            base = model(**batch).loss
        with attach(model, lean=True):
            with model.disable_adapter():
                torch.testing.assert_close(model(**batch).loss, base)
            model.merge_adapter()
            torch.testing.assert_close(model(**batch).loss, adapted)
            model.unmerge_adapter()
            torch.testing.assert_close(model(**batch).loss, adapted)
