"""`SeekCallback`: what it does to the model and when, and the kinds of training it goes along with."""

import functools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback

from hf_tokenseek import MemoryCallback, SeekCallback, SeekConfig
from hf_tokenseek.seek.attention import DitchState, ScoutState
from tests.tiny_training import EVERYTHING, SELECTS, arguments, examples, logs, losses, pad, trainer, weights

# versions of transformers before 5.23 know no other name
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")

CHECKPOINTING = [
    {},
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
]


def run(model, args, callback=None, **options):
    own = trainer(model, args, kind=Trainer, callbacks=[] if callback is None else [callback], **options)
    own.train()
    return own


def test_off_is_said_where_it_is_asked_for():
    with pytest.raises(ValueError, match="Leave it out of `callbacks`"):
        SeekCallback(False)


@pytest.mark.parametrize("value", [None, True, {}, SeekConfig()])
def test_defaults(value):
    assert SeekCallback(value).config == SeekConfig()


def test_patches_at_construction_and_gives_back_after_training(tiny_llama, tmp_path):
    """Also the state between: a stopped trainer computes plainly, loss and gradients to the bit."""
    model, batch = tiny_llama(), pad(examples(4))
    own = trainer(model, arguments(tmp_path), kind=Trainer, callbacks=[SeekCallback(SELECTS)])
    assert model.config._attn_implementation == "tokenseek_sdpa" and model(**batch).logits is None
    own.train()
    model.train()
    twin = tiny_llama()
    twin.load_state_dict(model.state_dict())
    assert model.config._attn_implementation == twin.config._attn_implementation == "sdpa"
    found, expected = model(**batch), twin(**batch)
    assert torch.equal(found.loss, expected.loss) and torch.equal(found.logits, expected.logits)
    model.zero_grad()
    for output in (found, expected):
        output.loss.backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_prints_what_was_swapped_and_the_first_step_once(tiny_llama, tmp_path, capsys):
    run(tiny_llama(), arguments(tmp_path), SeekCallback(SELECTS))
    printed = capsys.readouterr().out
    for line in (
        "TokenSeek on LlamaForCausalLM: labelled=1.0, context=0.2, score=evidence\n",
        "  attention   sdpa -> tokenseek_sdpa in 3 layers",
        "  forward     LlamaForCausalLM.forward",
        "TokenSeek's first step:\n",
        "  rows        k/n = ",
    ):
        assert printed.count(line) == 1, line


def test_every_step_scouts_and_ditches_every_layer_once(tiny_llama, tmp_path, monkeypatch):
    calls = []
    for state in (ScoutState, DitchState):
        attend = state.attend

        @functools.wraps(attend)
        def spy(self, module, query, *args, _attend=attend, _name=state.__name__, **rule):
            calls.append((_name, query.shape[2]))
            return _attend(self, module, query, *args, **rule)

        monkeypatch.setattr(state, "attend", spy)
    run(tiny_llama(), arguments(tmp_path, max_steps=2), SeekCallback(SELECTS))
    assert [name for name, _ in calls] == (["ScoutState"] * 3 + ["DitchState"] * 3) * 2
    rows, n = calls[3][1], calls[0][1]
    assert rows < n and {size for name, size in calls[:6]} == {rows, n}


def test_metrics_reset_only_when_asked(tiny_llama, tmp_path):
    callback = SeekCallback(SELECTS)
    assert callback.metrics() == {}
    run(tiny_llama(), arguments(tmp_path, logging_strategy="no"), callback)
    kept = callback.metrics(reset=False)
    assert kept == callback.metrics() and set(kept) >= {"seek/selected_share", "seek/evidence_mass"}
    assert callback.metrics() == {}


def test_with_the_memory_callback(tiny_llama, tmp_path):
    """Saved activations are those of the selected rows, in the stock trainer too."""

    def saved(*callbacks):
        options = {"callbacks": [*callbacks, MemoryCallback()]}
        own = trainer(tiny_llama(), arguments(tmp_path, max_steps=2), kind=Trainer, **options)
        own.train()
        return logs(own)[0]["memory/saved_activations_mib"]

    assert saved(SeekCallback(SELECTS)) < 0.8 * saved()


@pytest.mark.parametrize("options", CHECKPOINTING, ids=["kept", "reentrant", "nonreentrant"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_checkpointing_changes_nothing(tiny_llama, tmp_path, options, accumulation):
    options = {**options, "gradient_accumulation_steps": accumulation}
    sgd = {"optim": "sgd", "learning_rate": 0.5}
    found = run(tiny_llama(), arguments(tmp_path, **options, **sgd), SeekCallback(SELECTS))
    plain = {"gradient_accumulation_steps": accumulation}
    kept = run(tiny_llama(), arguments(tmp_path, **plain, **sgd), SeekCallback(SELECTS))
    assert losses(found) == pytest.approx(losses(kept), rel=1e-5)
    for p, q in zip(found.model.parameters(), kept.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", CHECKPOINTING, ids=["kept", "reentrant", "nonreentrant"])
def test_bfloat16_autocast_is_plain_training_but_for_rounding(tiny_llama, tmp_path, options):
    """Everything selected: off the float32 losses by no more than twice what plain bfloat16 is off."""
    sgd = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 6}
    truth = losses(run(tiny_llama(), arguments(tmp_path, **sgd)))
    plain = losses(run(tiny_llama(), arguments(tmp_path, bf16=True, **sgd)))
    own = run(tiny_llama(), arguments(tmp_path, bf16=True, **sgd, **options), SeekCallback(EVERYTHING))
    assert own.model.dtype == torch.float32 and losses(own) != truth
    for found, half, exact in zip(losses(own), plain, truth, strict=True):
        assert abs(found - exact) <= 2 * abs(half - exact) + 2**-9 * exact


def test_bfloat16_weights(tiny_llama, tmp_path):
    own = run(tiny_llama().bfloat16(), arguments(tmp_path, max_steps=8), SeekCallback(SELECTS))
    assert own.model.dtype == torch.bfloat16
    assert losses(own)[-1] < losses(own)[0] and all(torch.isfinite(p).all() for p in own.model.parameters())


def with_adapter(model):
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], lora_dropout=0.0))


@pytest.mark.parametrize("options", CHECKPOINTING, ids=["kept", "reentrant", "nonreentrant"])
def test_adapter_trains_and_the_base_stays(tiny_llama, tmp_path, options):
    model = with_adapter(tiny_llama())
    before = weights(model)
    own = run(model, arguments(tmp_path, max_steps=6, **options), SeekCallback(SELECTS))
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    assert all("seek/selected_share" in entry for entry in logs(own))
    # evaluation and saving see the adapter
    own.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_adapter_with_everything_selected_is_plain_training(tiny_llama, tmp_path):
    sgd = {"optim": "sgd", "learning_rate": 0.5}
    found = run(with_adapter(tiny_llama()), arguments(tmp_path, **sgd), SeekCallback(EVERYTHING))
    plain = run(with_adapter(tiny_llama()), arguments(tmp_path, **sgd))
    assert losses(found) == pytest.approx(losses(plain), rel=1e-5)
    for p, q in zip(found.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_frozen_parts_stay_and_the_rest_is_plain_training(tiny_llama, tmp_path):
    def frozen():
        model = tiny_llama()
        model.model.embed_tokens.requires_grad_(False)
        model.model.layers[0].requires_grad_(False)
        return model

    sgd = {"optim": "sgd", "learning_rate": 0.5}
    found = run(frozen(), arguments(tmp_path, **sgd), SeekCallback(EVERYTHING))
    plain = run(frozen(), arguments(tmp_path, **sgd))
    assert losses(found) == pytest.approx(losses(plain), rel=1e-5)
    assert torch.equal(found.model.model.embed_tokens.weight, tiny_llama().model.embed_tokens.weight)
    for p, q in zip(found.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_goes_on_after_a_run_that_failed(tiny_llama, tmp_path):
    """An exception leaves no half-patched model behind: training again is as if it had not been."""

    class Stop(TrainerCallback):
        armed = True

        def on_step_end(self, args, state, control, **kwargs):
            if self.armed:
                raise KeyboardInterrupt

    stop = Stop()
    own = trainer(
        tiny_llama(), arguments(tmp_path, learning_rate=0.0), kind=Trainer, callbacks=[SeekCallback(SELECTS), stop]
    )
    with pytest.raises(KeyboardInterrupt):
        own.train()
    stop.armed = False
    own.train()
    fresh = run(tiny_llama(), arguments(tmp_path, learning_rate=0.0), SeekCallback(SELECTS))
    assert losses(own)[-4:] == losses(fresh)


def test_label_that_no_row_has_gives_a_step_of_nothing(tiny_llama, tmp_path):
    own = trainer(tiny_llama(), arguments(tmp_path, max_steps=2), kind=Trainer, callbacks=[SeekCallback(SELECTS)])
    own.train_dataset = [{**row, "labels": [-100] * len(row["labels"])} for row in examples()]
    before = weights(own.model)
    own.train()
    assert losses(own) == [0.0, 0.0]
    assert all(torch.equal(p, before[name]) for name, p in own.model.named_parameters())
