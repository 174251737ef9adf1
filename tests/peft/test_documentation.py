"""The snippets of docs/peft.md train with TokenSeek."""

import pytest
from transformers import LlamaForCausalLM

from tests.sft.snippets import run_snippet, snippets
from tests.sft.tiny_sft import logged, prompt_completion, tokenizer
from tests.tiny_training import examples, pad


def test_adapter_snippet_trains_and_saves(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _ = snippets("peft.md")
    trainer = run_snippet(code, model=tiny_llama(), dataset=examples(), collator=pad)["trainer"]
    assert len(logged(trainer, "loss", "seek/selected_share")[1]) == 1
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_quantised_snippet_trains(tiny_llama, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    monkeypatch.chdir(tmp_path)
    _, code = snippets("peft.md")
    config = tiny_llama().config
    config.hidden_size, config.intermediate_size, config.head_dim = 64, 128, 16
    LlamaForCausalLM(config).save_pretrained("base")
    trainer = run_snippet(code, name="base", tokenizer=tokenizer(), dataset=prompt_completion())["trainer"]
    assert type(trainer.model.get_base_model().model.layers[0].mlp.up_proj.base_layer).__name__ == "Linear4bit"
    assert len(logged(trainer, "loss", "seek/selected_share")[1]) == 1
