"""The Python snippets of README and docs run as they stand, on a tiny model and tiny data."""

import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from tests.sft.tiny_sft import conversations, prompt_completion, tokenizer, words
from tests.tiny_training import examples, pad

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "docs/trl.md", "docs/peft.md", "docs/lean.md"]
# snippets leave out what a run of seconds needs
QUICK = {"max_steps": 2, "use_cpu": True, "report_to": [], "disable_tqdm": True, "per_device_train_batch_size": 2}


def snippets(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)


def pairs() -> Dataset:
    rows = [{"prompt": words(i, 12), "chosen": words(i + 1, 3), "rejected": words(i + 2, 3)} for i in range(8)]
    return Dataset.from_list(rows)


@pytest.fixture
def quickly(tmp_path, tiny_llama, monkeypatch):
    """Two steps on a CPU in a scratch folder; every name of a model is that of a tiny one."""
    tiny_llama().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    load, post_init = AutoModelForCausalLM.from_pretrained, TrainingArguments.__post_init__

    def tiny(name, **options):
        return load(tmp_path / "model", **options)

    def quick(self):
        for name, value in QUICK.items():
            setattr(self, name, value)
        post_init(self)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", tiny)
    monkeypatch.setattr(TrainingArguments, "__post_init__", quick)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", PAGES)
def test_snippets_run(page, quickly):
    batch = pad(examples()[:2])
    known = {
        "name": "some/model",
        "Trainer": Trainer,
        "args": TrainingArguments(output_dir="out", remove_unused_columns=False),
        "train_dataset": examples(),
        "collator": pad,
        "tokenizer": tokenizer(),
        "conversations": conversations(),
        "pairs": pairs(),
        "ids": batch["input_ids"],
        "mask": batch["attention_mask"],
        "labels": batch["labels"],
    }
    found = snippets(page)
    assert found
    for code in found:
        torch.manual_seed(0)
        trl = "SFT" in code or "DPO" in code
        fresh = {
            "model": AutoModelForCausalLM.from_pretrained("some/model").train(),
            "reference": AutoModelForCausalLM.from_pretrained("some/model"),
            "peft_config": LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
            "dataset": prompt_completion() if trl else examples(),
        }
        if trl:
            fresh["train_dataset"] = prompt_completion()
        space = {**known, **fresh}
        exec(compile(code, page, "exec"), space)
        if "trainer" in space:
            if "train()" not in code:
                space["trainer"].train()
            assert space["trainer"].state.global_step == 2
