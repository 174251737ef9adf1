"""`TokenSeekTrainer`: the same training as the stock `Trainer`, with seek inside."""

import json
import logging
from dataclasses import asdict

import pytest
import torch
from transformers import GPTJConfig, GPTJForCausalLM, Trainer, TrainerCallback

from hf_tokenseek import LeanCallback, LemoCallback, MemoryCallback, SeekCallback, SeekConfig, TokenSeekTrainer
from tests.tiny_training import EVERYTHING, SELECTS, arguments, examples, logs, losses, pad, trainer

SEEK_KEYS = {
    "seek/selected_share", "seek/labelled_share", "seek/plain_share", "seek/evidence_mass", "seek/mean_position",
}  # fmt: skip
COST_KEYS = {"memory/saved_activations_mib", "speed/step_seconds", "speed/tokens_per_second"}


def run(model, args, **options):
    own = trainer(model, args, **options)
    own.train()
    return own


def test_plain_arguments_train_with_the_defaults_and_log_it(tiny_llama, tmp_path):
    own = run(tiny_llama(), arguments(tmp_path))
    [callback] = [c for c in own.callback_handler.callbacks if isinstance(c, SeekCallback)]
    assert callback.config == SeekConfig()
    assert callback.handle.metrics.total == 4
    assert len(logs(own)) == 4 and all(set(entry) >= SEEK_KEYS | COST_KEYS for entry in logs(own))
    assert all(0 < entry["seek/selected_share"] < 1 for entry in logs(own))


def test_figures_are_in_trainer_state_json(tiny_llama, tmp_path):
    own = run(tiny_llama(), arguments(tmp_path, SELECTS, save_strategy="steps", save_steps=2))
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert all(set(entry) >= SEEK_KEYS | COST_KEYS for entry in state["log_history"] if "loss" in entry)
    own.save_state()
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert sum(set(entry) >= SEEK_KEYS for entry in state["log_history"]) == 4


def test_trackers_see_the_figures(tiny_llama, tmp_path):
    """A tracker is a callback that comes before ours and reads the logs."""
    seen = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    run(tiny_llama(), arguments(tmp_path, SELECTS), callbacks=[Tracker()])
    assert sum(set(entry) >= SEEK_KEYS | COST_KEYS for entry in seen) == 4


def test_trackers_of_a_stock_trainer_see_the_figures_if_they_are_listed_last(tiny_llama, tmp_path):
    """What README tells to do, and why: before our callbacks a tracker sees none of them."""
    seen = [], []

    class Tracker(TrainerCallback):
        def __init__(self, logs):
            self.logs = logs

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.logs.append(set(logs))

    class Early(Tracker):
        pass

    callbacks = [Early(seen[0]), SeekCallback(SELECTS), MemoryCallback(), Tracker(seen[1])]
    run(tiny_llama(), arguments(tmp_path), kind=Trainer, callbacks=callbacks)
    first, last = (sum(entry >= SEEK_KEYS | COST_KEYS for entry in entries) for entries in seen)
    assert (first, last) == (0, 4)


def test_a_log_is_the_mean_over_its_micro_batches(tiny_llama, tmp_path):
    every = run(tiny_llama(), arguments(tmp_path, SELECTS))
    pairs = run(tiny_llama(), arguments(tmp_path, SELECTS, logging_steps=2))
    for key in SEEK_KEYS:
        each = [entry[key] for entry in logs(every)]
        means = [sum(each[:2]) / 2, sum(each[2:]) / 2]
        assert [entry[key] for entry in logs(pairs)] == pytest.approx(means)


@pytest.mark.parametrize("seek", [SELECTS, {"ratio": 0.4, "score": "random", "plain_fallback": False}])
def test_callback_in_the_stock_trainer_is_the_same_training(tiny_llama, tmp_path, seek):
    own = run(tiny_llama(), arguments(tmp_path, seek))
    stock = run(tiny_llama(), arguments(tmp_path), kind=Trainer, callbacks=[SeekCallback(seek)])
    assert losses(own) == losses(stock)
    assert all(torch.equal(p, q) for p, q in zip(own.model.parameters(), stock.model.parameters(), strict=True))
    # random scores collect no attention mass
    expected = SEEK_KEYS - ({"seek/evidence_mass"} if "score" in seek else set())
    assert all(expected <= set(entry) for entry in logs(stock))


@pytest.mark.parametrize("everything", [EVERYTHING, {"ratio": 1.0, "plain_fallback": False}], ids=["context", "ratio"])
@pytest.mark.parametrize("accumulation", [(4, 1), (2, 2), (1, 4)], ids=str)
def test_everything_selected_is_plain_training(tiny_llama, tmp_path, everything, accumulation):
    size, steps = accumulation
    options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 5}
    # Adam would make a step out of a rounding in a gradient near zero
    options |= {"optim": "sgd", "learning_rate": 0.5}
    plain = run(tiny_llama(), arguments(tmp_path, **options), kind=Trainer)
    own = run(tiny_llama(), arguments(tmp_path, everything, **options))
    assert losses(own) == pytest.approx(losses(plain), rel=1e-5)
    assert losses(own)[-1] < losses(own)[0]
    for p, q in zip(own.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "seek", [SELECTS, {"ratio": 0.4, "score": "loss", "plain_fallback": False}], ids=["stages", "ratio"]
)
def test_accumulation_is_one_large_batch(tiny_llama, tmp_path, seek):
    """Sequences of different length and padding: the Trainer's count divides, not each micro-batch's own."""
    found = []
    for size, steps in ((4, 1), (2, 2), (1, 4)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        found.append(losses(run(tiny_llama(), arguments(tmp_path, seek, **options))))
    assert found[1] == pytest.approx(found[0], rel=1e-4) and found[2] == pytest.approx(found[0], rel=1e-4)


def test_none_trains_plainly(tiny_llama, tmp_path):
    own = run(tiny_llama(), arguments(tmp_path, None))
    plain = run(tiny_llama(), arguments(tmp_path), kind=Trainer)
    assert losses(own) == losses(plain)
    assert not any(key.startswith("seek/") for entry in own.state.log_history for key in entry)
    assert all(set(entry) >= COST_KEYS for entry in logs(own))


def test_none_leaves_a_custom_loss_alone(tiny_llama, tmp_path):
    calls = []

    def loss(outputs, labels, num_items_in_batch=None):
        calls.append(outputs.logits.shape)
        return outputs.logits.square().mean()

    run(tiny_llama(), arguments(tmp_path, None), compute_loss_func=loss)
    assert len(calls) == 4


class DuringTraining(TrainerCallback):
    """Evaluates, predicts and generates in the middle of training, as a user's callback may."""

    def __init__(self, alone):
        self.alone, self.found = alone, []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        ids = torch.tensor([examples()[0]["input_ids"]])
        was_training = model.training
        model.eval()
        twin = self.alone()
        twin.load_state_dict(model.state_dict())
        twin.eval()
        with torch.no_grad():
            self.found.append(torch.equal(model(input_ids=ids).logits, twin(input_ids=ids).logits))
        tokens = [m.generate(ids, max_new_tokens=4, do_sample=False) for m in (model, twin)]
        self.found.append(torch.equal(*tokens))
        model.train(was_training)


def test_evaluation_and_generation_see_the_original(tiny_llama, tmp_path):
    watch = DuringTraining(tiny_llama)
    options = {"eval_strategy": "steps", "eval_steps": 2}
    own = run(tiny_llama(), arguments(tmp_path, SELECTS, **options), callbacks=[watch])
    assert watch.found == [True] * 8
    evaluated = [entry["eval_loss"] for entry in own.state.log_history if "eval_loss" in entry]
    twin = tiny_llama()
    twin.load_state_dict(own.model.state_dict())
    stock = trainer(twin, arguments(tmp_path), kind=Trainer)
    assert len(evaluated) == 2
    assert own.evaluate()["eval_loss"] == stock.evaluate()["eval_loss"] == pytest.approx(evaluated[-1], rel=1e-6)
    own_logits, stock_logits = (t.predict(examples()[:1]).predictions for t in (own, stock))
    assert (own_logits == stock_logits).all() and own_logits.shape[1] == 16


@pytest.mark.parametrize("options, said", [
    ({"label_smoothing_factor": 0.1}, r"`label_smoothing_factor`=0.1.*Set label_smoothing_factor=0.0"),
    ({"torch_compile": True}, r"`torch_compile`=True.*Set torch_compile=False"),
    ({"neftune_noise_alpha": 5.0}, r"`neftune_noise_alpha`=5.0.*no noise.*Set neftune_noise_alpha=None"),
])  # fmt: skip
def test_arguments_that_bypass_seek_are_refused_before_training(tiny_llama, tmp_path, options, said):
    for build in (
        lambda: trainer(tiny_llama(), arguments(tmp_path, SELECTS, **options)),
        lambda: trainer(tiny_llama(), arguments(tmp_path, **options), kind=Trainer, callbacks=[SeekCallback()]),
    ):
        with pytest.raises(ValueError, match=said):
            build()
    own = trainer(tiny_llama(), arguments(tmp_path, None, **options))
    # a callback that comes when the trainer has been built
    own.add_callback(SeekCallback())
    with pytest.raises(ValueError, match=said):
        own.train()


def test_custom_loss_is_refused_by_name(tiny_llama, tmp_path):
    with pytest.raises(ValueError, match="does not support `compute_loss_func`.*set seek=None"):
        trainer(tiny_llama(), arguments(tmp_path), compute_loss_func=lambda *_: 0.0)


def test_unsupported_model_is_refused_at_construction(tmp_path):
    model = GPTJForCausalLM(GPTJConfig(vocab_size=128, n_embd=32, n_layer=1, n_head=2, rotary_dim=8))
    with pytest.raises(ValueError, match="model_type 'gptj': its attention does not go through.*Supported: "):
        trainer(model, arguments(tmp_path))
    run(model, arguments(tmp_path, None, max_steps=1))


class WarnedAt(TrainerCallback):
    """The steps at whose beginning the log has a warning."""

    def __init__(self, caplog):
        self.caplog, self.steps = caplog, []

    def on_step_begin(self, args, state, control, **kwargs):
        if "does not fit" in self.caplog.text:
            self.steps.append(state.global_step + 1)


@pytest.mark.parametrize(("steps", "said"), [(12, 10), (4, 4)])
def test_data_that_does_not_fit_is_said(tiny_llama, tmp_path, caplog, steps, said):
    """Everywhere labelled: scouting cannot pay, each micro-batch is trained plainly, and the run says so, once."""
    rows = [{**row, "labels": row["input_ids"]} for row in examples()]
    own = trainer(tiny_llama(), arguments(tmp_path, max_steps=steps), callbacks=[warned := WarnedAt(caplog)])
    own.train_dataset = rows
    with caplog.at_level(logging.WARNING):
        own.train()
    assert caplog.text.count("TokenSeek does not fit this data") == 1
    assert f"TokenSeek does not fit this data: {said} of {said} micro-batches" in caplog.text
    assert warned.steps == [step for step in range(1, steps + 1) if step > 10]
    assert all(entry["seek/plain_share"] == 1 for entry in logs(own))


@pytest.mark.parametrize(
    ("name", "callback"), [("seek", SeekCallback({"context": 0.4})), ("lemo", LemoCallback({"keep": 0.4, "block": 4}))]
)
def test_arguments_and_a_callback_that_disagree_are_refused(tiny_llama, tmp_path, name, callback):
    other = {"seek": {"context": 0.3}, "lemo": {"keep": 0.3}}[name]
    with pytest.raises(ValueError, match=rf"arguments have {name}=.*and {type(callback).__name__} has .*Leave one"):
        trainer(tiny_llama(), arguments(tmp_path, **{"seek": None, name: other}), callbacks=[callback])
    # defaults of the arguments, and the same twice, are no contradiction
    for same in (asdict(callback.config), True):
        trainer(tiny_llama(), arguments(tmp_path, **{"seek": None, name: same}), callbacks=[callback])


@pytest.mark.parametrize("kind", [SeekCallback, LeanCallback, MemoryCallback])
def test_callbacks_may_be_classes(tiny_llama, tmp_path, kind):
    """As in the stock trainer; none is there twice."""
    own = run(tiny_llama(), arguments(tmp_path, {}, lean=True, max_steps=1), callbacks=[kind])
    assert [type(c) for c in own.callback_handler.callbacks].count(kind) == 1


def test_probe_logs_the_cosine_with_the_full_gradient(tiny_llama, tmp_path):
    own = run(tiny_llama(), arguments(tmp_path, {**SELECTS, "probe_steps": 2}))
    probed = ["seek/gradient_cosine" in entry for entry in logs(own)]
    assert probed == [True, False, True, False]
    assert 0 < logs(own)[0]["seek/gradient_cosine"] < 1
    exact = run(tiny_llama(), arguments(tmp_path, {**EVERYTHING, "probe_steps": 2}))
    assert logs(exact)[0]["seek/gradient_cosine"] == pytest.approx(1, abs=1e-5)


def test_probing_changes_nothing(tiny_llama, tmp_path):
    probed = run(tiny_llama(), arguments(tmp_path, {**SELECTS, "probe_steps": 1}))
    assert losses(probed) == losses(run(tiny_llama(), arguments(tmp_path, SELECTS)))


def test_positional_arguments_are_those_of_the_trainer(tiny_llama, tmp_path):
    rows = examples()
    own = TokenSeekTrainer(tiny_llama(), arguments(tmp_path), pad, rows, rows[:2])
    own.train()
    assert losses(own) == losses(run(tiny_llama(), arguments(tmp_path)))
    assert own.evaluate()["eval_samples_per_second"] > 0
