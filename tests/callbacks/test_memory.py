import functools
import inspect
import json
import logging
import weakref
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_tokenseek.callbacks import MemoryCallback
from hf_tokenseek.callbacks import memory as callback_module
from hf_tokenseek.memory import SavedActivations

SAVED, SECONDS, TOKENS = "memory/saved_activations_mib", "speed/step_seconds", "speed/tokens_per_second"
LENGTHS = (24, 16, 40, 8, 24, 24, 32, 16)


@pytest.fixture(autouse=True)
def count_every_forward(monkeypatch):
    monkeypatch.setattr(callback_module, "SECONDS_PER_TENSOR", 0.0)


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the test moves."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(callback_module.time, "perf_counter", lambda: clock.now)
    return clock


def example(length):
    ids = torch.arange(length) % 128
    # the last two tokens are padding
    mask = (torch.arange(length) < length - 2).long()
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": mask}


def make_trainer(model, tmp_path, callbacks, **options):
    defaults = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 1,
        "max_steps": 4,
        "logging_steps": 2,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "use_cpu": True,
        "train_sampling_strategy": "sequential",
    }
    dataset = [example(length) for length in LENGTHS]
    arguments = TrainingArguments(**(defaults | options))
    return Trainer(model, arguments, train_dataset=dataset, eval_dataset=dataset[:1], callbacks=callbacks)


def training_logs(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def independent_mib(make_model, tmp_path, **options):
    """Runs the same training without the callback; MiB that each micro-batch keeps at the end of its forward."""
    model, counted = make_model(), []
    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    forward = model.forward

    # the Trainer reads the signature to choose columns
    @functools.wraps(forward)
    def counting_forward(**inputs):
        storages = []

        def pack(tensor):
            storages.append(weakref.ref(tensor.untyped_storage()))
            return tensor.detach()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = forward(**inputs)
        alive = {storage.data_ptr(): storage.nbytes() for ref in storages if (storage := ref()) is not None}
        counted.append(sum(size for pointer, size in alive.items() if pointer not in parameters) / 2**20)
        return output

    model.forward = counting_forward
    make_trainer(model, tmp_path, [], **options).train()
    return counted


def test_figures_equal_an_independent_count(tiny_llama, tmp_path):
    expected = independent_mib(tiny_llama, tmp_path)
    trainer = make_trainer(tiny_llama(), tmp_path, [MemoryCallback()])
    trainer.train()
    first, second = training_logs(trainer)
    assert first[SAVED] == max(expected[:2])
    assert second[SAVED] == max(expected[2:])
    assert "memory/peak_mib" not in first
    assert all(entry[SECONDS] > 0 and entry[TOKENS] > 0 for entry in (first, second))
    trainer.save_state()
    stored = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert stored == trainer.state.log_history


def test_accumulation_logs_the_largest_micro_batch(tiny_llama, tmp_path):
    options = {"gradient_accumulation_steps": 4, "max_steps": 2, "logging_steps": 1}
    expected = independent_mib(tiny_llama, tmp_path, **options)
    trainer = make_trainer(tiny_llama(), tmp_path, [MemoryCallback()], **options)
    trainer.train()
    assert len(set(expected)) == len(set(LENGTHS))
    assert [entry[SAVED] for entry in training_logs(trainer)] == [max(expected[:4]), max(expected[4:])]


def test_checkpointing_lowers_the_figure(tiny_llama, tmp_path):
    figures = []
    for checkpointing in (False, True):
        trainer = make_trainer(tiny_llama(), tmp_path, [MemoryCallback()], gradient_checkpointing=checkpointing)
        trainer.train()
        figures.append(training_logs(trainer)[0][SAVED])
    assert figures[1] < figures[0] / 2


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"gradient_checkpointing": True}])
def test_training_is_unchanged(tiny_llama, tmp_path, options):
    losses, weights = [], []
    for callbacks in ([], [MemoryCallback()]):
        model = tiny_llama()
        trainer = make_trainer(model, tmp_path, callbacks, **options)
        trainer.train()
        losses.append([entry["loss"] for entry in training_logs(trainer)])
        weights.append(list(model.parameters()))
    assert losses[0] == losses[1]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_undo_leaves_no_trace(tiny_llama, tmp_path):
    model = tiny_llama()
    signature = inspect.signature(model.forward)
    during = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            during.append((vars(model)["forward"], inspect.signature(model.forward)))

    make_trainer(model, tmp_path, [MemoryCallback(), Look()]).train()
    assert len(during) == 4 and all(seen == signature for _, seen in during)
    assert "forward" not in vars(model)


def test_undo_restores_a_forward_that_was_set_on_the_instance(tiny_llama, tmp_path):
    model = tiny_llama()
    own = model.forward = model.forward
    make_trainer(model, tmp_path, [MemoryCallback()]).train()
    assert vars(model)["forward"] is own


def test_a_wrapper_that_came_later_stays_and_counting_stops(tiny_llama, tmp_path):
    model = tiny_llama()

    class WrapAgain(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            inner = model.forward
            model.forward = lambda **inputs: inner(**inputs)

    callback = MemoryCallback()
    make_trainer(model, tmp_path, [callback, WrapAgain()]).train()
    assert "forward" in vars(model)
    callback.metrics()
    assert model(**{name: tensor[None] for name, tensor in example(8).items()}).loss.isfinite()
    assert SAVED not in callback.metrics()


def test_a_run_after_a_failed_one_starts_clean(tiny_llama, tmp_path):
    model, callback = tiny_llama(), MemoryCallback()

    class Fail(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise RuntimeError("failed")

    with pytest.raises(RuntimeError, match="failed"):
        make_trainer(model, tmp_path, [callback, Fail()]).train()
    assert "forward" in vars(model)
    trainer = make_trainer(model, tmp_path, [callback])
    trainer.train()
    assert SAVED in training_logs(trainer)[0]
    assert "forward" not in vars(model)


def test_only_training_logs_have_figures_and_evaluation_is_not_counted(tiny_llama, tmp_path):
    expected = max(independent_mib(tiny_llama, tmp_path))
    options = {"eval_strategy": "steps", "eval_steps": 1, "logging_steps": 4}
    trainer = make_trainer(tiny_llama(), tmp_path, [MemoryCallback()], **options)
    trainer.train()
    assert training_logs(trainer)[0][SAVED] == expected
    others = [entry for entry in trainer.state.log_history if "loss" not in entry]
    assert any("eval_loss" in entry for entry in others)
    assert all(SAVED not in entry and SECONDS not in entry for entry in others)


def test_a_trainer_that_logs_itself_is_not_disturbed(tiny_llama, tmp_path):
    callback, seen = MemoryCallback(), []
    callback.logged_by_trainer = True

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    class SelfLogging(Trainer):
        def log(self, logs, *args, **kwargs):
            if "loss" in logs:
                logs |= callback.metrics()
            super().log(logs, *args, **kwargs)

    trainer = make_trainer(tiny_llama(), tmp_path, [Tracker(), callback])
    trainer.__class__ = SelfLogging
    trainer.train()
    assert [SAVED in logs for logs in seen] == ["loss" in logs for logs in seen]
    assert all(SAVED in entry for entry in training_logs(trainer))


def drive(callback, clock, model, durations, log=()):
    """One forward per step of so many seconds; figures are read after the steps in `log`."""
    batch = {name: tensor[None] for name, tensor in example(10).items()}
    read = []
    for step, seconds in enumerate(durations):
        callback.on_step_begin(None, None, None)
        model(**batch)
        clock.now += seconds
        callback.on_step_end(None, None, None)
        if step in log:
            read.append(callback.metrics())
    return read


def begin(callback, model, **arguments):
    arguments = {"n_gpu": 0, "device": torch.device("cpu")} | arguments
    callback.on_train_begin(SimpleNamespace(**arguments), None, None, model=model)


def test_seconds_and_tokens_leave_the_warm_up_out(tiny_llama, clock):
    model, callback = tiny_llama(), MemoryCallback()
    begin(callback, model)
    first, second, third = drive(callback, clock, model, [9.0, 1.0, 3.0, 2.0, 5.0], log=(2, 3, 4))
    # 8 of the 10 tokens are real
    assert (first[SECONDS], first[TOKENS]) == (2.0, 2 * 8 / 4.0)
    assert (second[SECONDS], second[TOKENS]) == (2.0, 8 / 2.0)
    assert (third[SECONDS], third[TOKENS]) == (5.0, 8 / 5.0)
    assert callback.metrics() == {}


def test_a_single_step_is_its_own_warm_up(tiny_llama, clock):
    model, callback = tiny_llama(), MemoryCallback()
    begin(callback, model)
    first, second = drive(callback, clock, model, [9.0, 1.0], log=(0, 1))
    assert first[SECONDS] == 9.0
    assert second[SECONDS] == 1.0


def test_reading_without_reset(tiny_llama, clock):
    model, callback = tiny_llama(), MemoryCallback()
    begin(callback, model)
    drive(callback, clock, model, [1.0, 1.0])
    assert callback.metrics(reset=False) == callback.metrics() != callback.metrics()


def test_counting_pauses_in_proportion_to_its_cost(tiny_llama, clock, monkeypatch):
    monkeypatch.setattr(callback_module, "SECONDS_PER_TENSOR", 1e-5)
    model, callback, counted = tiny_llama(), MemoryCallback(), []
    begin(callback, model)
    enter = SavedActivations.__enter__
    monkeypatch.setattr(SavedActivations, "__enter__", lambda self: counted.append(clock.now) or enter(self))
    saved = callback._saved
    drive(callback, clock, model, [0.0])
    pause = saved.tensors * 1e-5 / callback_module.SHARE_OF_TIME
    drive(callback, clock, model, [0.4 * pause, 0.4 * pause, 0.4 * pause, 0.0])
    assert counted == [0.0, pytest.approx(1.2 * pause)]
    # each log has its own count
    callback.metrics()
    drive(callback, clock, model, [0.0])
    assert len(counted) == 3


def test_peak_of_a_device_that_counts(tiny_llama, clock, monkeypatch):
    class Device:
        peak = 0

        def max_memory_allocated(self, device):
            return self.peak

        def reset_peak_memory_stats(self, device):
            self.peak = 0

    device = Device()
    monkeypatch.setattr(torch, "get_device_module", lambda _: device)
    callback = MemoryCallback()
    device.peak = 7 * 2**20
    begin(callback, tiny_llama(), device=torch.device("meta"))
    assert callback.metrics() == {"memory/peak_mib": 0.0}
    device.peak = 3 * 2**20
    assert callback.metrics() == {"memory/peak_mib": 3.0}
    assert callback.metrics() == {"memory/peak_mib": 0.0}


def test_hooks_of_others_are_left_alone(tiny_llama, clock):
    model, callback, packed = tiny_llama(), MemoryCallback(), []
    begin(callback, model)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(1) or t.detach(), lambda t: t):
        (figures,) = drive(callback, clock, model, [1.0], log=(0,))
    assert packed
    assert SAVED not in figures and TOKENS in figures


def test_compiled_models_are_not_counted_and_not_broken_up(clock):
    model, callback = torch.nn.Linear(4, 4), MemoryCallback()
    begin(callback, model)
    output = torch.compile(model, backend="eager", fullgraph=True)(torch.ones(1, 4))
    assert torch.equal(output, torch.nn.functional.linear(torch.ones(1, 4), model.weight, model.bias))
    assert callback.metrics() == {}


@pytest.mark.parametrize(
    ("n_gpu", "zero3", "message"), [(2, False, "n_gpu=2"), (1, True, "ZeRO-3")], ids=["data_parallel", "zero3"]
)
def test_where_counting_would_harm_it_is_refused_loudly(tiny_llama, monkeypatch, caplog, n_gpu, zero3, message):
    monkeypatch.setattr(callback_module, "is_deepspeed_zero3_enabled", lambda: zero3)
    # the loggers of transformers do not propagate to the one that pytest watches
    monkeypatch.setattr(callback_module, "logger", logging.getLogger("memory-callback"))
    model, callback = tiny_llama(), MemoryCallback()
    begin(callback, model, n_gpu=n_gpu)
    assert message in caplog.text
    assert "forward" not in vars(model)
    callback.on_step_begin(None, None, None)
    callback.on_step_end(None, None, None)
    callback.on_train_end(None, None, None)
    assert callback.metrics().keys() == {SECONDS}
