"""Every adapter of PEFT: everything selected is plain training, by default the losses are, and only adapters train."""

import peft
import pytest
import torch
from peft import (
    AdaptionPromptConfig,
    CPTConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)
from transformers import Trainer

from hf_tokenseek import SeekCallback, SeekConfig, attach
from hf_tokenseek.seek.adapters import REFUSED_LORA_OPTIONS, SUPPORTED
from tests.peft.tiny_peft import (
    CAUSAL,
    LAYERS,
    LORA_VARIANTS,
    METHODS,
    RATIO_ONE,
    SELECTS,
    adapted,
    gradients,
    largest_error,
    lora,
    micro_batch,
)
from tests.tiny_training import arguments, trainer

TOLERANCE = 2e-5
CONFIGS = {**LORA_VARIANTS, **dict.fromkeys(METHODS)}


def config_of(name: str):
    if name in LORA_VARIANTS:
        return LORA_VARIANTS[name]()
    kind, fields = METHODS[name]
    if not hasattr(peft, kind):
        pytest.skip(f"this PEFT has no {kind}")
    return getattr(peft, kind)(**{**CAUSAL, "target_modules": LAYERS, **fields})


def plain(model):
    loss = model(**micro_batch()).loss
    return loss.detach(), gradients(model, loss)


def selected(model, seek):
    with attach(model, seek=seek) as handle:
        loss = model(**micro_batch()).loss
        return loss.detach(), gradients(model, loss), handle.selection


@pytest.mark.parametrize("name", CONFIGS)
def test_everything_selected_is_plain_training(tiny_llama, name):
    model = adapted(tiny_llama(), config_of(name))
    loss, truth = plain(model)
    found, grads, _ = selected(model, RATIO_ONE)
    assert all(g.any() for g in truth.values())
    torch.testing.assert_close(found, loss, rtol=TOLERANCE, atol=0)
    assert largest_error(grads, truth) <= TOLERANCE


@pytest.mark.parametrize("name", CONFIGS)
def test_selection_keeps_the_losses_and_trains_only_the_adapter(tiny_llama, name):
    """That the losses are the plain model's says that no row depends on a row that was left out."""
    model = adapted(tiny_llama(), config_of(name))
    loss, truth = plain(model)
    found, grads, rows = selected(model, SELECTS)
    assert rows.shape[1] < 12
    torch.testing.assert_close(found, loss, rtol=TOLERANCE, atol=0)
    assert all(g.any() for g in grads.values()) and largest_error(grads, truth) > 1e-3
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_every_supported_method_is_tested():
    assert {*METHODS, "LORA"} == set(SUPPORTED)


PROMPTS = {
    "PROMPT_TUNING": PromptTuningConfig(**CAUSAL, num_virtual_tokens=4),
    "PREFIX_TUNING": PrefixTuningConfig(**CAUSAL, num_virtual_tokens=4),
    "P_TUNING": PromptEncoderConfig(**CAUSAL, num_virtual_tokens=4, encoder_hidden_size=16),
    "CPT": CPTConfig(**CAUSAL, cpt_token_ids=[1, 2], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2]),
    "ADAPTION_PROMPT": AdaptionPromptConfig(**CAUSAL, adapter_len=4, adapter_layers=2),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompt_learning_is_refused_before_anything_is_computed(tiny_llama, tmp_path, name):
    model = peft.get_peft_model(tiny_llama(), PROMPTS[name])
    said = f"does not support the PEFT method {name}: .* Supported: .*LORA.* turn TokenSeek off with seek=None"
    with pytest.raises(ValueError, match=said):
        attach(model, seek=True)
    with pytest.raises(ValueError, match=said):
        trainer(model, arguments(tmp_path), kind=Trainer, callbacks=[SeekCallback()])
    assert model.get_base_model().config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "name, config",
    [
        ("LILY", ("LilyConfig", {})),
        ("PVERA", ("PveraConfig", {"target_modules": ["q_proj", "o_proj"]})),
        ("PSOFT", ("PsoftConfig", {"r": 4})),
    ],
)
def test_methods_that_look_at_other_rows_or_are_unknown_are_refused(tiny_llama, name, config):
    kind, fields = config
    if not hasattr(peft, kind):
        pytest.skip(f"this PEFT has no {kind}")
    model = peft.get_peft_model(tiny_llama(), getattr(peft, kind)(**{**CAUSAL, "target_modules": LAYERS, **fields}))
    with pytest.raises(ValueError, match=f"does not support the PEFT method {name}: "):
        attach(model, seek=True)


@pytest.mark.parametrize("option", REFUSED_LORA_OPTIONS)
def test_lora_options_that_are_another_method_are_refused(tiny_llama, option):
    model = peft.get_peft_model(tiny_llama(), lora())
    setattr(model.peft_config["default"], option, [1, 2])
    with pytest.raises(ValueError, match=f"does not support the PEFT method LORA with {option}: "):
        attach(model, seek=True)


def test_adapter_on_the_output_embeddings_is_refused(tiny_llama):
    model = peft.get_peft_model(tiny_llama(), lora(target_modules=["lm_head", "q_proj"]))
    with pytest.raises(ValueError, match="adapter on the output embeddings.*Take them .`lm_head`. out of"):
        attach(model, seek=True)


def test_adapter_added_by_transformers_is_trained(tiny_llama):
    model = tiny_llama()
    try:
        model.add_adapter(lora())
    except ValueError as error:
        if "not compatible" not in str(error):
            raise
        pytest.skip(f"this transformers adds no adapters of this PEFT ({error})")
    model.train()
    loss, truth = plain(model)
    assert any("lora_A" in name for name in truth)
    found, grads, _ = selected(model, RATIO_ONE)
    torch.testing.assert_close(found, loss, rtol=TOLERANCE, atol=0)
    assert largest_error(grads, truth) <= TOLERANCE
    model = tiny_llama()
    model.add_adapter(LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="adapter on the output embeddings"):
        attach(model, seek=SeekConfig())
