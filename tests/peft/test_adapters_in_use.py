"""Adapters while they are used: several of them, merged, saved, loaded, trained on."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from hf_tokenseek import TokenSeekTrainer, attach
from tests.peft.tiny_peft import RATIO_ONE, SELECTS, adapted, gradients, largest_error, lora, micro_batch
from tests.tiny_training import EVERYTHING, arguments, examples, losses, pad, trainer, weights


def two_adapters(tiny_llama):
    model = adapted(tiny_llama(), lora())
    model.add_adapter("second", lora(target_modules=["k_proj", "q_proj"]))
    return model


@pytest.mark.parametrize("active", [["default"], ["second"], ["default", "second"]], ids="+".join)
def test_the_active_adapters_are_trained(tiny_llama, active):
    model = two_adapters(tiny_llama)
    model.base_model.set_adapter(active)
    loss = model(**micro_batch()).loss
    truth = gradients(model, loss)
    assert {name.split(".")[-2] for name in truth} == set(active)
    for seek in (RATIO_ONE, SELECTS):
        with attach(model, seek=seek):
            found = model(**micro_batch()).loss
            grads = gradients(model, found)
        torch.testing.assert_close(found, loss, rtol=2e-5, atol=0)
        assert all(g.any() for g in grads.values())
        assert (largest_error(grads, truth) <= 2e-5) == (seek is RATIO_ONE)
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_adapters_may_change_while_attached(tiny_llama):
    """Scouting and ditching both follow `set_adapter` and `disable_adapter`."""
    model = two_adapters(tiny_llama)
    plain, found = {}, {}
    for losses_of, attached in ((plain, False), (found, True)):
        handle = attach(model, seek=SELECTS) if attached else None
        for name in ("default", "second"):
            model.set_adapter(name)
            losses_of[name] = float(model(**micro_batch()).loss)
        with model.disable_adapter():
            losses_of["none"] = float(model(**micro_batch()).loss)
        if handle is not None:
            handle.undo()
    assert len(set(plain.values())) == 3
    assert list(found.values()) == pytest.approx(list(plain.values()), rel=2e-5)


@pytest.mark.parametrize("seek", [EVERYTHING, {"context": 0.2, "plain_fallback": False}], ids=["all", "selected"])
def test_trained_adapter_is_saved_loaded_and_merged(tiny_llama, tmp_path, seek):
    model = get_peft_model(tiny_llama(), lora())
    base = {name: value for name, value in weights(model).items() if "lora" not in name}
    adapter = {name: value for name, value in weights(model).items() if "lora" in name}
    own = trainer(model, arguments(tmp_path, seek, save_strategy="steps", save_steps=4))
    own.train()
    assert all(not torch.equal(dict(model.named_parameters())[name], value) for name, value in adapter.items())
    for name, value in base.items():
        assert torch.equal(dict(model.named_parameters())[name], value)
    ids = torch.tensor([examples()[0]["input_ids"]])
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "checkpoint-4").eval()
        assert torch.equal(loaded(input_ids=ids).logits, expected)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert not (tmp_path / "checkpoint-4" / "model.safetensors").exists()
    # a merged model is an ordinary one, and frozen
    again = trainer(merged.train().requires_grad_(), arguments(tmp_path, seek, max_steps=1))
    again.train()
    assert len(losses(again)) == 1


def test_merging_while_attached_changes_nothing_but_the_weights(tiny_llama):
    model = adapted(tiny_llama(), lora())
    with attach(model, seek=SELECTS):
        before = float(model(**micro_batch()).loss)
        model.merge_adapter()
        assert float(model(**micro_batch()).loss) == pytest.approx(before, rel=1e-4)
        model.unmerge_adapter()
        assert float(model(**micro_batch()).loss) == pytest.approx(before, rel=1e-4)


def test_loaded_adapter_is_trained_on(tiny_llama, tmp_path):
    """Continuing from a saved adapter is the run that was not interrupted, and resuming is too."""
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant"}
    options |= {"optim": "sgd", "learning_rate": 0.3, "train_sampling_strategy": "sequential"}
    seek = {"context": 0.2, "plain_fallback": False}

    def build():
        torch.manual_seed(3)
        return get_peft_model(tiny_llama(), lora(lora_dropout=0.0))

    whole = trainer(build(), arguments(tmp_path, seek, **options))
    whole.train()
    resumed = trainer(build(), arguments(tmp_path, seek, **options))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(resumed) == losses(whole) and len(losses(whole)) == 6
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "checkpoint-3", is_trainable=True)
    rest = {**options, "max_steps": 3, "save_strategy": "no"}
    loaded = TokenSeekTrainer(
        model.train(), arguments(tmp_path, seek, **rest), train_dataset=examples()[6:], data_collator=pad
    )
    loaded.train()
    assert losses(loaded) == pytest.approx(losses(whole)[3:], rel=1e-5)
    for p, q in zip(loaded.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_small_adapters_keep_more_context_by_default(tiny_llama):
    model = tiny_llama()
    with attach(model, seek=True) as handle:
        assert handle.seek.config.context == 0.1
    small = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=1, target_modules=["q_proj"]))
    with attach(small, seek=True) as handle:
        assert handle.seek.config.context == 0.25 and "context=0.25" in handle.report()
    with attach(small, seek={"context": 0.1}) as handle:
        assert handle.seek.config.context == 0.1
