"""`IstCallback` and the field `ist`: what they log, that a resumed run is the same run, and what they refuse."""

import json

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer, TrainerCallback

from hf_tokenseek import IstCallback, IstConfig, TokenSeekTrainer
from tests.ist.tiny_ist import LAYERS, deep_llama
from tests.peft.tiny_peft import lora
from tests.tiny_training import SELECTS, arguments, logs, losses, trainer

HALF = {"layers": 0.5, "period": 2}
CHECKPOINTED = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 3, "max_steps": 7}
# each depends on something else that has to survive: importance, offloaded state, norms, nothing
RESUMED = {
    "ist": {"score_steps": 2},
    "ist, antithetic, exp": {"score_steps": 1, "antithetic": True, "reward": "exp", "candidates": 2},
    "top, offload": {"policy": "top", "score_steps": 1, "state": "offload"},
    "gradient_norm, keep": {"policy": "gradient_norm", "state": "keep"},
    "random, unbiased, long period": {"policy": "random", "unbiased": True, "period": 5},
    "round_robin, no embeddings": {"policy": "round_robin", "embeddings": False},
}


def adapted():
    return get_peft_model(deep_llama(torch.float32), lora(lora_dropout=0.1))


def run(model, args, kind=Trainer, resume=None, callbacks=(), **options):
    own = trainer(model, args, kind=kind, callbacks=list(callbacks), **options)
    own.train(resume_from_checkpoint=resume)
    return own


def own_run(model, folder, ist, resume=None, seek=None, **options):
    return run(model, arguments(folder, seek, ist=ist, **options), TokenSeekTrainer, resume)


def assert_same(first, second):
    assert losses(first) == losses(second)
    for (name, a), b in zip(first.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b), name


class Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise KeyboardInterrupt


def test_off_is_said_where_it_is_asked_for():
    with pytest.raises(ValueError, match="Leave it out of `callbacks`"):
        IstCallback(False)
    assert IstCallback({"layers": 0.5}).config == IstConfig(layers=0.5) and IstCallback().config == IstConfig()


def test_stock_trainer_with_the_callback_is_our_trainer(tmp_path, capsys):
    stock = run(deep_llama(torch.float32), arguments(tmp_path), callbacks=[IstCallback(HALF)])
    said = capsys.readouterr().out
    assert (
        "3 of 6 layers train for 2 steps, policy=ist, state=free" in said and "layer | trained, steps 0 to 2" in said
    )
    own = own_run(deep_llama(torch.float32), tmp_path, HALF)
    assert_same(stock, own)
    assert losses(own) != losses(run(deep_llama(torch.float32), arguments(tmp_path)))
    keys = {"ist/lowest_layer", "ist/optimizer_mib", "ist/optimizer_predicted_mib", "ist/gradient_predicted_mib"}
    assert all(keys | {"ist/probe_share"} <= entry.keys() for entry in logs(stock) + logs(own))


@pytest.mark.parametrize("seek", [None, SELECTS])
def test_all_layers_train_plainly(tmp_path, seek):
    plain = run(adapted(), arguments(tmp_path, seek), TokenSeekTrainer)
    assert_same(own_run(adapted(), tmp_path, {"layers": 1.0}, seek=seek), plain)


@pytest.mark.parametrize("options", RESUMED.values(), ids=RESUMED.keys())
def test_a_resumed_run_is_the_same_run(tmp_path, options):
    ist, build = {**HALF, **options}, adapted if options.get("embeddings", True) else deep_llama
    if build is deep_llama:
        build = lambda: deep_llama(torch.float32)  # noqa: E731
    whole = own_run(build(), tmp_path / "whole", ist, **CHECKPOINTED)
    resumed = own_run(
        build(), tmp_path / "resumed", ist, resume=str(tmp_path / "whole" / "checkpoint-3"), **CHECKPOINTED
    )
    assert_same(whole, resumed)
    states = [
        torch.load(tmp_path / name / "checkpoint-6" / "ist.pt", weights_only=True) for name in ("whole", "resumed")
    ]
    assert states[0]["history"] == states[1]["history"] and states[0]["policy"] == states[1]["policy"]
    assert len({tuple(layers) for _, layers in states[0]["history"]}) > 1


def test_a_killed_run_goes_on_from_its_last_checkpoint_by_itself(tmp_path):
    whole = own_run(adapted(), tmp_path / "whole", HALF, **CHECKPOINTED)
    args = arguments(tmp_path / "killed", None, ist=HALF, **CHECKPOINTED)
    with pytest.raises(KeyboardInterrupt):
        run(adapted(), args, TokenSeekTrainer, callbacks=[Interrupt()])
    resumed = own_run(adapted(), tmp_path / "killed", HALF, resume=True, **CHECKPOINTED)
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    own_run(adapted(), tmp_path, HALF, **CHECKPOINTED)
    checkpoint = tmp_path / "checkpoint-3"
    with pytest.raises(ValueError, match=r"\['layers'\] differ"):
        own_run(adapted(), tmp_path / "other", {**HALF, "layers": 0.34}, resume=str(checkpoint), **CHECKPOINTED)
    (checkpoint / "ist.pt").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"ist.pt cannot be read .* Resume from an older checkpoint"):
        own_run(adapted(), tmp_path / "other", HALF, resume=str(checkpoint), **CHECKPOINTED)
    (checkpoint / "ist.pt").unlink()
    with pytest.raises(ValueError, match="saved without sparse tuning"):
        own_run(adapted(), tmp_path / "other", HALF, resume=str(checkpoint), **CHECKPOINTED)


def test_figures_are_those_of_what_trains(tmp_path):
    own = own_run(adapted(), tmp_path, {"policy": "round_robin", "layers": 0.34, "period": 1}, max_steps=3)
    layer = 4 * sum(p.numel() for name, p in own.model.named_parameters() if ".layers.0." in name and "lora" in name)
    for index, entry in enumerate(logs(own)):
        assert entry["ist/lowest_layer"] == 2 * index
        assert entry["ist/gradient_predicted_mib"] * 2**20 == 2 * layer
        assert entry["ist/optimizer_predicted_mib"] == 2 * entry["ist/gradient_predicted_mib"]
        # and a step count of four bytes for each of six matrices
        assert entry["ist/optimizer_mib"] * 2**20 == 2 * 2 * layer + 2 * 6 * 4
    assert json.loads(json.dumps(logs(own)))


def test_evaluation_sees_the_original_and_all_is_given_back(tmp_path):
    model = adapted()
    own = own_run(model, tmp_path, HALF, eval_strategy="steps", eval_steps=2)
    assert not any("forward" in vars(layer) for layer in model.get_base_model().model.layers)
    assert len([entry for entry in own.state.log_history if "eval_loss" in entry]) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"torch_compile": True}, "torch_compile=True"),
        ({"ddp_find_unused_parameters": False}, "ddp_find_unused_parameters=False"),
    ],
)
def test_arguments_that_it_does_not_know_are_refused(tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        trainer(deep_llama(torch.float32), arguments(tmp_path, None, ist=HALF, **options))


def test_with_checkpointing_and_accumulation_it_is_the_same_run(tmp_path):
    plain = own_run(adapted(), tmp_path, HALF, gradient_accumulation_steps=2)
    checkpointed = own_run(
        adapted(),
        tmp_path,
        HALF,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    assert losses(plain) == pytest.approx(losses(checkpointed), rel=1e-6)


@pytest.mark.parametrize("optim", ["adafactor", "adamw_torch_fused", "sgd"])
def test_other_optimizers(tmp_path, optim):
    own = own_run(deep_llama(torch.float32), tmp_path, {**HALF, "policy": "random"}, optim=optim, max_steps=6)
    sizes = {entry["ist/optimizer_mib"] for entry in logs(own)}
    assert len(sizes) == 1 and losses(own)[-1] < losses(own)[0]
    assert LAYERS == 6
