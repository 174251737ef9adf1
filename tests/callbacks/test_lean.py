"""`LeanCallback` and the field `lean`: the same losses as plain training, with fewer saved bytes."""

import pytest
import torch
from transformers import Trainer

from hf_tokenseek import LeanCallback, MemoryCallback, TokenSeekTrainer
from tests.tiny_training import EVERYTHING, SELECTS, arguments, examples, logs, losses, pad, trainer

SAVED = "memory/saved_activations_mib"


def run(model, args, kind=Trainer, callbacks=(), **options):
    own = trainer(model, args, kind=kind, callbacks=list(callbacks), **options)
    own.train()
    return own


def test_stock_trainer_with_the_callback_trains_as_without_it(tiny_llama, tmp_path, capsys):
    # MemoryCallback logs through callbacks that come after it; a stock Trainer's history has its keys
    plain = run(tiny_llama(), arguments(tmp_path), callbacks=[MemoryCallback()])
    model = tiny_llama()
    norm = type(model.model.norm)
    lean = run(model, arguments(tmp_path), callbacks=[LeanCallback(), MemoryCallback()])
    assert losses(lean) == pytest.approx(losses(plain), rel=1e-5)
    assert all(a[SAVED] < 0.8 * b[SAVED] for a, b in zip(logs(lean), logs(plain), strict=True))
    assert "Lean layers in LlamaForCausalLM" in capsys.readouterr().out
    # given back after training
    assert type(model.model.norm) is norm


def test_trains_again_and_under_accumulation_and_checkpointing(tiny_llama, tmp_path):
    options = {
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    }
    plain = trainer(tiny_llama(), arguments(tmp_path, **options), kind=Trainer)
    lean = trainer(tiny_llama(), arguments(tmp_path, **options), kind=Trainer, callbacks=[LeanCallback()])
    for _ in range(2):
        plain.train()
        lean.train()
        assert losses(lean) == pytest.approx(losses(plain), rel=1e-5)


@pytest.mark.parametrize("seek", [None, EVERYTHING, SELECTS])
def test_the_field_lean(tiny_llama, tmp_path, seek):
    plain = run(tiny_llama(), arguments(tmp_path, seek), TokenSeekTrainer)
    lean = run(tiny_llama(), arguments(tmp_path, seek, lean=True), TokenSeekTrainer)
    assert losses(lean) == pytest.approx(losses(plain), rel=1e-5)
    assert all(a[SAVED] < b[SAVED] for a, b in zip(logs(lean), logs(plain), strict=True))
    assert lean.args.to_dict()["lean"] is True


def test_a_model_that_model_init_makes(tiny_llama, tmp_path):
    def run_with(callbacks):
        own = Trainer(
            args=arguments(tmp_path),
            model_init=tiny_llama,
            train_dataset=examples(),
            data_collator=pad,
            callbacks=callbacks,
        )
        own.train()
        return losses(own)

    assert run_with([LeanCallback()]) == pytest.approx(run_with([]), rel=1e-5)


def test_bf16_trains(tiny_llama, tmp_path):
    plain = run(tiny_llama(), arguments(tmp_path, bf16=True))
    lean = run(tiny_llama(), arguments(tmp_path, bf16=True), callbacks=[LeanCallback()])
    assert losses(lean) == pytest.approx(losses(plain), rel=2e-2)


def test_refuses_what_replaces_the_same_layers(tiny_llama, tmp_path, monkeypatch):
    args = arguments(tmp_path)
    args.use_liger_kernel = True
    with pytest.raises(ValueError, match="use_liger_kernel"):
        LeanCallback().on_init_end(args, None, None, model=tiny_llama())


def test_nothing_to_swap(tmp_path):
    with pytest.raises(ValueError, match="nothing to swap in Linear"):
        LeanCallback().on_init_end(arguments(tmp_path), None, None, model=torch.nn.Linear(2, 2))
