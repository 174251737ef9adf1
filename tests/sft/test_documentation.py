"""The snippets of docs/trl.md train with TokenSeek."""

import pytest

from hf_tokenseek import SeekCallback
from tests.sft.snippets import run_snippet, snippets
from tests.sft.test_other_trainers import pairs
from tests.sft.tiny_sft import logged, prompt_completion, tokenizer


@pytest.mark.parametrize("index", range(3), ids=["own trainer", "stock trainer", "preferences"])
def test_snippet_trains(tiny_llama, tmp_path, monkeypatch, index):
    monkeypatch.chdir(tmp_path)
    codes = snippets("trl.md")
    assert len(codes) == 3
    names = {
        "model": tiny_llama(),
        "reference": tiny_llama(),
        "tokenizer": tokenizer(),
        "dataset": prompt_completion(),
        "pairs": pairs(),
    }
    trainer = run_snippet(codes[index], **names)["trainer"]
    [callback] = [c for c in trainer.callback_handler.callbacks if isinstance(c, SeekCallback)]
    assert callback.config.context == 0.2
    assert len(logged(trainer, "loss", "seek/selected_share")[1]) == 1
