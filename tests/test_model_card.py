"""What a saved model says about its training."""

import json
from dataclasses import asdict

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import Trainer

from hf_tokenseek import SeekConfig
from hf_tokenseek.model_card import END, START, write_model_card
from tests.sft import tiny_sft
from tests.tiny_training import SELECTS, arguments, trainer


def options_in(card: ModelCard) -> dict:
    section = card.text.partition(START)[2].partition(END)[0]
    return json.loads(section.partition("```json\n")[2].partition("\n```")[0])


def test_checkpoint_and_final_model_have_a_card(tiny_llama, tmp_path):
    model = tiny_llama()
    model.config._name_or_path = "some/base-model"
    own = trainer(model, arguments(tmp_path, SELECTS, lean=True, save_strategy="steps", save_steps=2))
    own.train()
    own.save_model()
    for folder in (tmp_path / "checkpoint-2", tmp_path):
        card = ModelCard.load(folder / "README.md")
        assert "tokenseek" in card.data.tags and card.data.base_model == "some/base-model"
        options = options_in(card)
        assert options["lean"] is True and SeekConfig(**options["seek"]) == SeekConfig(**SELECTS)


def test_an_adapter_keeps_its_own_card(tiny_llama, tmp_path):
    model = get_peft_model(tiny_llama(), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    own = trainer(model, arguments(tmp_path, SELECTS))
    own.save_model()
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "peft" and {"lora", "tokenseek"} <= set(card.data.tags)
    assert "Training procedure" in card.text or len(card.text.partition(START)[0]) > 200


def test_the_card_of_trl_is_kept(tiny_llama, tmp_path):
    own = tiny_sft.trainer(tiny_llama(), tiny_sft.arguments(tmp_path, SELECTS, save_strategy="steps", save_steps=2))
    own.train()
    own.save_model()
    card = ModelCard.load(tmp_path / "README.md")
    assert {"trl", "sft", "tokenseek"} <= set(card.data.tags) and "Framework versions" in card.text
    assert options_in(card)["seek"]["context"] == SELECTS["context"]
    assert START in (tmp_path / "checkpoint-2" / "README.md").read_text()


@pytest.mark.parametrize("kind", ["none", "stock"])
def test_without_tokenseek_nothing_is_written(tiny_llama, tmp_path, kind):
    options = {"kind": Trainer} if kind == "stock" else {}
    own = trainer(tiny_llama(), arguments(tmp_path, "plain" if kind == "stock" else None), **options)
    own.save_model()
    assert not (tmp_path / "README.md").exists()


def test_a_card_is_kept_and_our_section_replaced(tiny_llama, tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags: [mine]\n---\n\n# Mine\n\nBefore.\n")
    write_model_card(tmp_path, tiny_llama(), {"seek": asdict(SeekConfig()), "lean": False})
    file = tmp_path / "README.md"
    file.write_text(file.read_text() + "\nBehind.\n")
    write_model_card(tmp_path, tiny_llama(), {"seek": asdict(SeekConfig(context=0.5)), "lean": False})
    card = ModelCard.load(file)
    assert card.data.license == "mit" and card.data.tags == ["mine", "tokenseek"]
    assert card.text.count(START) == 1 and options_in(card)["seek"]["context"] == 0.5
    assert card.text.index("Before.") < card.text.index(START) < card.text.index(END) < card.text.index("Behind.")


def test_a_folder_is_no_base_model(tiny_llama, tmp_path):
    model = tiny_llama()
    model.config._name_or_path = str(tmp_path)
    write_model_card(tmp_path, model, {"seek": asdict(SeekConfig()), "lean": False})
    assert ModelCard.load(tmp_path / "README.md").data.base_model is None
