"""Runs that are interrupted, repeated or out of memory, and what they leave behind."""

import functools
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Trainer

from hf_tokenseek import SeekCallback, TokenSeekTrainer
from tests.tiny_training import EVERYTHING, SELECTS, arguments, examples, logs, losses, pad, trainer, weights

SAMPLED = {**SELECTS, "temperature": 1.0}
RANDOM = {"ratio": 0.4, "score": "random", "plain_fallback": False}


def dropping_gpt2():
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2)).train()


@pytest.mark.parametrize("seek", [SELECTS, SAMPLED, RANDOM], ids=["evidence", "sampled", "random"])
@pytest.mark.parametrize("make", ["llama", "gpt2"])
def test_resumed_run_equals_uninterrupted(tiny_llama, tmp_path, make, seek):
    """Selection and dropout are drawn as if nothing had happened."""
    build = tiny_llama if make == "llama" else dropping_gpt2
    options = {"max_steps": 6, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 3}
    whole = trainer(build(), arguments(tmp_path, seek, **options))
    whole.train()
    resumed = trainer(build(), arguments(tmp_path, seek, **options))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert len(losses(whole)) == 6 and losses(resumed) == losses(whole)
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("seek", [SAMPLED, RANDOM], ids=["sampled", "random"])
def test_every_micro_batch_draws_its_own_selection(tiny_llama, tmp_path, seek):
    """One batch again and again: the selections differ from step to step and within a step, and a run repeats them."""

    def selections():
        seen = []
        model = tiny_llama()
        own = trainer(model, arguments(tmp_path, seek, max_steps=3, gradient_accumulation_steps=2, learning_rate=0.0))
        own.train_dataset = examples(1) * 24
        [callback] = [c for c in own.callback_handler.callbacks if isinstance(c, SeekCallback)]
        handle, observe = callback.handle, callback.handle.metrics.observe

        @functools.wraps(observe)
        def spy(batch, done, *about, **options):
            seen.append(done.selection.rows.clone())
            return observe(batch, done, *about, **options)

        handle.metrics.observe = spy
        own.train()
        return seen

    first, second = selections(), selections()
    assert len(first) == 6 and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert len({str(rows.tolist()) for rows in first}) > 3


@pytest.mark.parametrize("kind", [TokenSeekTrainer, Trainer])
def test_smaller_batch_after_out_of_memory(tiny_llama, tmp_path, kind):
    """`auto_find_batch_size` starts training over with the same model and the same callbacks."""
    model, seen = tiny_llama(), []
    backbone = model.model.forward

    @functools.wraps(backbone)
    def forward(input_ids=None, **kwargs):
        seen.append(len(input_ids))
        if len(input_ids) > 4:
            raise RuntimeError("CUDA out of memory.")
        return backbone(input_ids=input_ids, **kwargs)

    model.model.forward = forward
    callbacks = [SeekCallback(SELECTS)] if kind is Trainer else None
    args = arguments(tmp_path, SELECTS if callbacks is None else "plain", auto_find_batch_size=True, max_steps=3,
                     per_device_train_batch_size=8)  # fmt: skip
    own = trainer(model, args, kind=kind, callbacks=callbacks)
    own.train()
    assert len(losses(own)) == 3 and seen[0] == 8 and seen[-1] <= 4
    assert all("seek/selected_share" in entry for entry in own.state.log_history if "loss" in entry)
    assert not model.config._attn_implementation.startswith("tokenseek")


def test_training_twice_goes_on(tiny_llama, tmp_path):
    own = trainer(tiny_llama(), arguments(tmp_path, EVERYTHING))
    plain = trainer(tiny_llama(), arguments(tmp_path), kind=Trainer)
    for _ in range(2):
        own.train()
        plain.train()
        assert losses(own) == pytest.approx(losses(plain), rel=1e-4)
        assert all(entry["seek/selected_share"] == 1 for entry in logs(own)) and len(logs(own)) == 4


def test_two_trainers_on_one_model_one_after_the_other(tiny_llama, tmp_path):
    """A first trainer that has trained does not stand in the way of a second, nor of a stock one."""
    model = tiny_llama()
    first = trainer(model, arguments(tmp_path, SELECTS))
    first.train()
    state = weights(model)
    second = trainer(model, arguments(tmp_path, RANDOM))
    second.train()
    fresh = tiny_llama()
    fresh.load_state_dict(state, strict=False)
    alone = trainer(fresh, arguments(tmp_path, RANDOM))
    alone.train()
    assert losses(second) == losses(alone)
    state = weights(model)
    stock = trainer(model, arguments(tmp_path), kind=Trainer)
    stock.train()
    fresh = tiny_llama()
    fresh.load_state_dict(state, strict=False)
    plain = trainer(fresh, arguments(tmp_path), kind=Trainer)
    plain.train()
    assert losses(stock) == losses(plain)


@pytest.mark.parametrize("options", [{}, {"bf16": True}], ids=["float32", "bf16"])
def test_model_init_is_the_same_training(tiny_llama, tmp_path, options):
    """`train` builds the model anew after the trainer was built, and accelerate has wrapped it by then."""
    # building a model draws from the generator that shuffles
    args = arguments(tmp_path, SELECTS, train_sampling_strategy="sequential", **options)
    made = TokenSeekTrainer(model_init=tiny_llama, args=args, train_dataset=examples(), data_collator=pad)
    made.train()
    given = trainer(tiny_llama(), args)
    given.train()
    assert losses(made) == losses(given)
    assert all("seek/selected_share" in entry for entry in made.state.log_history if "loss" in entry)


def test_config_and_saved_model_carry_no_trace(tiny_llama, tmp_path):
    model = tiny_llama()
    before = {**model.config.to_dict(), "dtype": "float32", "architectures": ["LlamaForCausalLM"]}  # by saving
    own = trainer(model, arguments(tmp_path, SELECTS, save_strategy="steps", save_steps=2))
    own.train()
    assert own.model.config.to_dict() == before
    own.save_model(str(tmp_path / "final"))
    ids = torch.tensor([examples()[0]["input_ids"]])
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
    for folder in ("checkpoint-2", "checkpoint-4", "final"):
        assert "tokenseek" not in json.dumps(json.loads((tmp_path / folder / "config.json").read_text())).lower()
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert loaded.config._attn_implementation == model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids=ids).logits, expected)
    saved = torch.load(tmp_path / "final" / "training_args.bin", weights_only=False)
    assert saved.seek.context == SELECTS["context"]
