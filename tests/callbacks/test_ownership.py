"""Whose method a model has: the newest trainer's while it trains, nobody's when a run is over or has failed."""

import copy
import pickle

import pytest
import torch
from transformers import Trainer, TrainerCallback

from hf_tokenseek import IstCallback, LeanCallback, LemoCallback, SeekCallback, TokenSeekArguments, VeloraCallback
from tests.tiny_training import SELECTS, arguments, examples, logs, pad, trainer

LEMO = {"keep": 0.5, "block": 4, "dense_first": 1}
CALLBACKS = {
    "seek": lambda: SeekCallback(SELECTS),
    "lean": LeanCallback,
    "velora": lambda: VeloraCallback({"groups": 4}),
    "ist": lambda: IstCallback({"policy": "random", "layers": 0.5}),
    "lemo": lambda: LemoCallback(LEMO),
}
NAMES = sorted(CALLBACKS)


def is_plain(model) -> bool:
    """Nothing of a method is left: no forward of an instance, no class of ours, no hook."""
    modules = list(model.modules())
    return (
        not any("forward" in vars(module) for module in modules)
        and not any(type(module).__module__.startswith("hf_tokenseek") for module in modules)
        and not any(module._forward_pre_hooks or module._forward_hooks for module in modules)
        and not any(name.startswith("_tokenseek") for name in vars(model))
    )


class Stops(TrainerCallback):
    """Somebody presses Ctrl-C in the second step."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise KeyboardInterrupt


def methods(folder, *names, **options):
    """Arguments that name methods."""
    values = {"seek": SELECTS, "lean": True, "velora": {"groups": 4}, "lemo": LEMO}
    values["ist"] = {"policy": "random", "layers": 0.5}
    own = {name: values[name] for name in names}
    plain = arguments(folder, **options).to_dict()
    kept = {name: plain[name] for name in ("max_steps", "learning_rate", "use_cpu", "remove_unused_columns")}
    return TokenSeekArguments(
        output_dir=str(folder), report_to=[], save_strategy="no", disable_tqdm=True, **{"seek": None, **kept, **own}
    )


@pytest.mark.parametrize("name", NAMES)
def test_an_interrupted_run_gives_the_model_back(tiny_llama, tmp_path, name):
    model = tiny_llama()
    own = trainer(model, methods(tmp_path, name), callbacks=[Stops])
    with pytest.raises(KeyboardInterrupt):
        own.train()
    assert is_plain(model)
    # and goes on if it is asked to
    own.remove_callback(Stops)
    own.train()
    assert is_plain(model) and own.state.global_step == 4


def test_a_refusal_while_a_trainer_is_built_gives_the_model_back(tiny_llama, tmp_path):
    model = tiny_llama()
    with pytest.raises(ValueError, match="dense_first=9"):
        trainer(model, methods(tmp_path, "seek", "lean"), callbacks=[LemoCallback({"dense_first": 9})])
    assert is_plain(model)


@pytest.mark.parametrize("name", NAMES)
def test_a_cell_of_a_notebook_may_run_twice(tiny_llama, tmp_path, name):
    """The trainer of the first run was never trained; the second one trains as if it were alone."""
    runs = []
    for times in (1, 2):
        model = tiny_llama()
        for _ in range(times):
            own = trainer(model, methods(tmp_path, name))
        own.train()
        assert is_plain(model)
        runs.append([entry["loss"] for entry in logs(own)])
    assert runs[0] == runs[1]


def test_an_older_trainer_trains_with_its_own_settings(tiny_llama, tmp_path):
    model = tiny_llama()
    older = trainer(model, arguments(tmp_path, {"context": 0.5, "plain_fallback": False}))
    trainer(model, arguments(tmp_path, {"context": 0.0, "plain_fallback": False}))
    older.train()
    assert all(entry["seek/selected_share"] > 0.5 for entry in logs(older))


@pytest.mark.parametrize("name", NAMES)
def test_a_method_goes_with_its_callback(tiny_llama, tmp_path, name):
    model, callback = tiny_llama(), CALLBACKS[name]()
    own = trainer(model, methods(tmp_path), callbacks=[callback])
    assert not is_plain(model)
    own.remove_callback(callback)
    assert is_plain(model)


def test_one_callback_in_two_trainers_leaves_no_model_patched(tiny_llama, tmp_path):
    models, callback = [tiny_llama(), tiny_llama()], SeekCallback(SELECTS)
    for model in models:
        own = Trainer(model, arguments(tmp_path), train_dataset=examples(), data_collator=pad, callbacks=[callback])
    own.train()
    assert all(map(is_plain, models))


def test_models_of_finished_runs_are_copied_and_pickled(tiny_llama, tmp_path):
    model = tiny_llama()
    own = trainer(model, methods(tmp_path, *NAMES))
    # also before they are
    waiting = pickle.loads(pickle.dumps(copy.deepcopy(tiny_llama())))
    own.train()
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert is_plain(same)
        inputs = pad(examples()[:2])
        assert torch.equal(same.eval()(**inputs).logits, model.eval()(**inputs).logits)
    assert is_plain(waiting)
