"""The Python snippets of README and the methods' pages train; those of trl and PEFT are in tests/sft, tests/peft."""

import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from tests.sft.snippets import run_snippet
from tests.sft.tiny_sft import prompt_completion, tokenizer
from tests.tiny_training import examples, pad

ROOT = Path(__file__).resolve().parents[2]
QUICK = {"max_steps": 2, "use_cpu": True, "report_to": [], "disable_tqdm": True, "per_device_train_batch_size": 2}


def snippets() -> list:
    found = []
    for page in ("README.md", "docs/lean.md", "docs/velora.md", "docs/ist.md", "docs/lemo.md", "docs/report.md"):
        codes = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
        assert codes
        found += [pytest.param(code, id=f"{page}-{index}") for index, code in enumerate(codes)]
    return found


@pytest.fixture
def quickly(tmp_path, tiny_llama, monkeypatch):
    """Two steps on a CPU in a scratch folder; every name of a model is that of a tiny one."""
    tiny_llama().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    load, post_init = AutoModelForCausalLM.from_pretrained, TrainingArguments.__post_init__

    def quick(self):
        vars(self).update(QUICK)
        post_init(self)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda name: load(tmp_path / "model").train())
    monkeypatch.setattr(TrainingArguments, "__post_init__", quick)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("code", snippets())
def test_snippet_trains(code, quickly):
    batch = pad(examples()[:2])
    after = run_snippet(
        code,
        Trainer=Trainer,
        torch=torch,
        model=AutoModelForCausalLM.from_pretrained("some/model"),
        args=TrainingArguments(output_dir="out", remove_unused_columns=False),
        train_dataset=prompt_completion() if "SFT" in code else examples(),
        collator=pad,
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
        ids=batch["input_ids"],
        mask=batch["attention_mask"],
        labels=batch["labels"],
    )
    if "trainer" in after:
        assert after["trainer"].state.global_step == 2
    elif after["handle"].seek is not None:
        assert after["handle"].selection.shape[0] == 2
    elif after["handle"].lemo is not None:
        assert after["handle"].lemo.elimination.kept
    else:
        assert after["step"] == 9 and len(after["handle"].ist.history) == 2
