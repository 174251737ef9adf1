"""What is not supported is refused by name, with the reason and with what works."""

import re

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_tokenseek import SeekConfig, attach
from hf_tokenseek.families import (
    BEFORE_HEAD,
    LOGITS_MULTIPLIED,
    MIXES_PACKED,
    POSITIONS_FROM_MASK,
    REFUSED,
    SUPPORTED,
    WINDOW_FROM_CONFIG,
)
from tests.seek.tiny_families import tiny_config, tiny_model

# of every reason one family or more, at full size on the meta device
REFUSED_TO_TRY = (
    "bloom", "falcon", "gptj", "mpt", "stablelm", "falcon_h1", "jamba", "lfm2", "mamba", "qwen3_next", "doge",
    "glm_moe_dsa", "minimax_m3_vl_text", "llama4_text", "inkling_text", "diffllama", "hrm_text", "longcat_flash",
    "blt", "bert", "roberta", "bart", "whisper", "gemma3",
)  # fmt: skip


@pytest.mark.parametrize("family", REFUSED_TO_TRY)
def test_refused_family_says_why_and_what_works(family):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family]())
    with pytest.raises(ValueError, match=re.escape(REFUSED[family])) as error:
        attach(model, seek=SeekConfig())
    assert f"{family!r}" in str(error.value) and all(name in str(error.value) for name in SUPPORTED)


def test_every_reason_is_tried():
    assert {REFUSED[family] for family in REFUSED_TO_TRY} == set(REFUSED.values())


def test_tables_name_families_that_exist_once():
    assert len(SUPPORTED) == len(set(SUPPORTED)) >= 40
    assert not set(SUPPORTED) & set(REFUSED)
    assert {*SUPPORTED, *REFUSED} <= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert {*MIXES_PACKED, *POSITIONS_FROM_MASK, *LOGITS_MULTIPLIED, *WINDOW_FROM_CONFIG, *BEFORE_HEAD} <= set(
        SUPPORTED
    )


def test_family_that_nobody_verified_is_refused_by_name(tiny_llama):
    model = tiny_llama()
    model.config.model_type = "llama_of_mine"
    match = "model_type 'llama_of_mine': it has not been verified.* Supported: afmoe, .*llama"
    with pytest.raises(ValueError, match=match):
        attach(model, seek=SeekConfig())


def test_other_heads_are_refused():
    model = AutoModelForSequenceClassification.from_config(tiny_config("llama"))
    with pytest.raises(ValueError, match="causal language models, got LlamaForSequenceClassification"):
        attach(model, seek=SeekConfig())
    with pytest.raises(ValueError, match="needs a transformers causal language model, got Linear"):
        attach(torch.nn.Linear(2, 2), seek=SeekConfig())


@pytest.mark.parametrize(
    "family, option, value",
    [
        ("mixtral", "output_router_logits", True),
        ("gemma3_text", "use_bidirectional_attention", True),
        ("gemma4_text", "use_bidirectional_attention", "all"),
        ("gpt2", "add_cross_attention", True),
    ],
)
def test_option_that_makes_another_model_is_refused_by_name(family, option, value):
    model = tiny_model(family)
    setattr(model.config, option, value)
    with pytest.raises(ValueError, match=f"does not support {option}={value!r}.*model.config.{option} = False"):
        attach(model, seek=SeekConfig())
