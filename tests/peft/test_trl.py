"""Adapters in trl's trainers: `peft_config` as usual."""

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig
from trl import DPOConfig, DPOTrainer, SFTTrainer

from hf_tokenseek import SeekCallback, TokenSeekSFTTrainer
from tests.peft.tiny_peft import CAUSAL, lora, velora
from tests.sft.test_other_trainers import FIGURES, SETTINGS, pairs
from tests.sft.tiny_sft import EVERYTHING, SELECTS, arguments, logged, run, tokenizer, trainer

TRL_KEYS = ("loss", "entropy", "mean_token_accuracy", "num_tokens")
CONFIGS = {
    "lora": lora,
    "dora": lambda: lora(use_dora=True),
    "head saved": lambda: lora(modules_to_save=["lm_head"]),
    "velora": velora,
}
LAYOUTS = {"padded": {}, "packed": {"packing": True, "max_length": 64}}


def trained(model) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


# VeLoRA's projection is a mean over rows, among which a stock run has padding: it is compared where there is none
CASES = [(name, layout) for name in CONFIGS for layout in LAYOUTS if (name, layout) != ("velora", "padded")]


@pytest.mark.parametrize("name, layout", CASES, ids="-".join)
def test_everything_selected_is_stock_training(tiny_llama, tmp_path, name, layout):
    stock, own = (
        run(tiny_llama(), arguments(tmp_path, seek, **LAYOUTS[layout]), kind=kind, peft_config=CONFIGS[name]())
        for seek, kind in (("stock", SFTTrainer), (EVERYTHING, TokenSeekSFTTrainer))
    )
    for key in TRL_KEYS:
        assert logged(own, key)[0] == pytest.approx(logged(stock, key)[0], rel=1e-5, abs=1e-7), key
    for name, value in trained(stock.model).items():
        torch.testing.assert_close(trained(own.model)[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_callback_in_the_stock_trainer_is_the_same_training(tiny_llama, tmp_path, bf16):
    options = {"peft_config": lora(lora_dropout=0.1)}
    own = run(tiny_llama(), arguments(tmp_path, SELECTS, bf16=bf16), **options)
    callbacks = [SeekCallback(SELECTS)]
    stock = run(tiny_llama(), arguments(tmp_path, bf16=bf16), kind=SFTTrainer, callbacks=callbacks, **options)
    keys = (*TRL_KEYS, "seek/selected_share")
    assert logged(own, *keys) == logged(stock, *keys) and max(logged(own, "seek/selected_share")[0]) < 0.5
    for name, value in trained(stock.model).items():
        assert torch.equal(trained(own.model)[name], value)


def test_preference_training_with_the_base_as_reference(tiny_llama, tmp_path):
    """The reference is the model with its adapter off, computed by the original forward."""
    runs = []
    for seek in (None, EVERYTHING, SELECTS):
        own = DPOTrainer(
            tiny_llama(),
            args=DPOConfig(**{**SETTINGS, "output_dir": str(tmp_path)}),
            train_dataset=pairs(),
            processing_class=tokenizer(),
            peft_config=LoraConfig(**CAUSAL, r=4),
            callbacks=[] if seek is None else [SeekCallback(seek)],
        )
        own.train()
        runs.append(own)
    stock, own, selected = runs
    for key in FIGURES:
        assert logged(own, key)[0] == pytest.approx(logged(stock, key)[0], rel=1e-4, abs=1e-6), key
    assert logged(selected, "loss")[0][0] == pytest.approx(logged(stock, "loss")[0][0], rel=1e-5)
    assert max(logged(selected, "seek/selected_share")[0]) < 0.5


def test_prompt_learning_is_refused_when_the_trainer_is_built(tiny_llama, tmp_path):
    with pytest.raises(ValueError, match="does not support the PEFT method PROMPT_TUNING"):
        trainer(
            tiny_llama(),
            arguments(tmp_path, SELECTS),
            peft_config=PromptTuningConfig(**CAUSAL, num_virtual_tokens=4),
        )
