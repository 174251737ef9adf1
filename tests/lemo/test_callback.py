"""`LemoCallback` and the field `lemo`: the same training, what is logged, resumed runs, and what is refused."""

from dataclasses import asdict

import pytest
import torch
from huggingface_hub import ModelCard
from peft import get_peft_model
from transformers import Trainer, TrainerCallback

from hf_tokenseek import LemoCallback, LemoConfig, SeekCallback, TokenSeekTrainer
from hf_tokenseek.memory import MemoryTracker
from hf_tokenseek.memory.step import attached
from tests.ist.tiny_ist import layers_of
from tests.lemo.deep_lemo import LAYERS, llama
from tests.lemo.tiny_lemo import lemo
from tests.peft.tiny_peft import lora
from tests.test_model_card import options_in
from tests.tiny_training import SELECTS, arguments, logs, losses, trainer

CHECKPOINTED = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 3, "max_steps": 7}
RESUMED = {
    "pooled": {},
    "random": {"score": "random", "rescore": 1},
    "oracle, detach": {"score": "oracle", "mode": "detach"},
}


def fields(**options) -> dict:
    return asdict(lemo(**options))


def run(model, args, kind=Trainer, resume=None, callbacks=(), **options):
    own = trainer(model, args, kind=kind, callbacks=list(callbacks), **options)
    own.train(resume_from_checkpoint=resume)
    return own


def own_run(folder, lemo, resume=None, seek=None, model=None, **options):
    model = llama(torch.float32) if model is None else model
    return run(model, arguments(folder, seek, lemo=lemo, **options), TokenSeekTrainer, resume)


def stock_run(folder, *callbacks, **options):
    return run(llama(torch.float32), arguments(folder, **options), callbacks=callbacks)


def assert_same(first, second):
    assert losses(first) == losses(second) and len(losses(first)) > 3
    for (name, a), b in zip(first.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_off_is_said_where_it_is_asked_for():
    with pytest.raises(ValueError, match="Leave it out of `callbacks`"):
        LemoCallback(False)
    assert LemoCallback({"keep": 0.5}).config == LemoConfig(keep=0.5) and LemoCallback().config == LemoConfig()


def test_stock_trainer_with_the_callback_is_our_trainer(tmp_path, capsys):
    stock = stock_run(tmp_path, LemoCallback(lemo()))
    said = capsys.readouterr().out
    assert "LeMo on LlamaForCausalLM: keep=0.5, block=4, score=pooled" in said
    own = own_run(tmp_path, fields())
    assert "layers 0 to 3 " in said and capsys.readouterr().out.count("LeMo on LlamaForCausalLM") == 1
    assert_same(stock, own)
    assert losses(own) != losses(stock_run(tmp_path))
    assert all(0.4 < entry["lemo/kept_share"] < 0.6 for entry in logs(stock) + logs(own))
    assert not any(key.startswith("lemo/") and key != "lemo/kept_share" for entry in logs(own) for key in entry)


def predicted(said: str) -> str:
    begin, end = said.index("  kept for backward"), said.index("  in all")
    return said[begin : said.index("\n", end)]


def test_the_table_predicts_the_bytes_that_layers_keep(tmp_path, capsys):
    """Counted at a forward pass of the same size, on a twin."""
    config = lemo(dense_first=1)
    trainer = stock_run(tmp_path, LemoCallback(config))
    said = capsys.readouterr().out
    own_run(tmp_path, asdict(config))
    assert predicted(said) == predicted(capsys.readouterr().out)
    length = max(len(row["input_ids"]) for row in trainer.train_dataset)
    ids = torch.zeros(2, length, dtype=torch.long)
    counted = []
    for methods in ({}, {"lemo": config}):
        model = llama(torch.float32)
        with attached(model, methods), MemoryTracker(model, ids) as tracker:
            loss = model(input_ids=ids, labels=ids).loss
            sizes = tracker.now.layers_of("activations")
        assert loss.requires_grad
        counted.append([size / 2**20 for size in sizes.values()])
    before, after = counted
    assert f"kept for backward at 2 x {length} tokens" in said
    assert f"in all     {sum(before):.4g} -> {sum(after):.4g} MiB" in said
    assert f"layers 0 to 0     {before[0]:.4g} -> {after[0]:.4g} MiB each" in said
    # tables of rotations aside
    assert after[0] == pytest.approx(before[0], rel=0.1) and after[1] < 0.7 * before[1]


def test_what_cannot_be_predicted_is_said(tmp_path, capsys):
    stock_run(tmp_path, LemoCallback(lemo()), optim="adagrad")
    assert "bytes of layers cannot be predicted: `optimizer` should be one of" in capsys.readouterr().out


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("order", [1, -1], ids=["lemo, seek", "seek, lemo"])
def test_callbacks_of_lemo_and_seek_in_any_order_are_our_trainer(tmp_path, order, bf16):
    callbacks = [LemoCallback(lemo()), SeekCallback(SELECTS)][::order]
    stock = stock_run(tmp_path, *callbacks, bf16=bf16)
    own = own_run(tmp_path, fields(), seek=SELECTS, bf16=bf16)
    assert_same(stock, own)
    assert losses(own) != losses(own_run(tmp_path, None, seek=SELECTS, bf16=bf16))
    keys = {"lemo/kept_share", "seek/selected_share", "seek/evidence_mass"}
    assert all(keys <= entry.keys() for entry in logs(stock) + logs(own))
    assert [entry["seek/plain_share"] for entry in logs(stock)] == [0] * 4


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("seek", [None, SELECTS], ids=["plain", "seek"])
def test_all_tokens_train_plainly(tmp_path, seek, bf16):
    plain = own_run(tmp_path, None, seek=seek, bf16=bf16)
    assert_same(own_run(tmp_path, fields(keep=1.0), seek=seek, bf16=bf16), plain)
    if bf16:
        # autocast's roundings are there to be seen
        assert losses(plain) != losses(own_run(tmp_path, fields(keep=1.0), seek=seek))


@pytest.mark.parametrize("options", RESUMED.values(), ids=RESUMED.keys())
@pytest.mark.parametrize("seek", [None, SELECTS], ids=["plain", "seek"])
def test_a_resumed_run_is_the_same_run(tmp_path, options, seek):
    seek = None if options.get("mode") == "detach" else seek
    whole = own_run(tmp_path / "whole", fields(**options), seek=seek, **CHECKPOINTED)
    checkpoint = str(tmp_path / "whole" / "checkpoint-3")
    resumed = own_run(tmp_path / "resumed", fields(**options), checkpoint, seek, **CHECKPOINTED)
    assert_same(whole, resumed)


def test_probes_compare_the_choice_with_that_of_the_paper(tmp_path):
    probes = {"probe_steps": 2, "labelled": False, "sinks": 0, "recent": 0}
    exact = own_run(tmp_path, fields(score="oracle", rescore=1, **probes))
    blind = own_run(tmp_path, fields(score="random", rescore=1, **probes))
    keys = {"lemo/retained_score", "lemo/recall"}
    assert [keys <= entry.keys() for entry in logs(exact)] == [True, False, True, False]
    assert all(entry["lemo/recall"] == 1 for entry in logs(exact)[::2])
    for entry, other in zip(logs(blind)[::2], logs(exact)[::2], strict=True):
        assert 0 < entry["lemo/retained_score"] < other["lemo/retained_score"] < 1 and entry["lemo/recall"] < 1
    # it is looked at, not changed
    assert_same(blind, own_run(tmp_path, fields(score="random", rescore=1, **{**probes, "probe_steps": 0})))


def test_thresholds_log_what_each_layer_keeps(tmp_path):
    thresholds = [0.0, 0.8, 1.2, 9.0]
    own = own_run(tmp_path, fields(score="oracle", thresholds=thresholds, bounds=[0.2, 0.9]))
    for entry in logs(own):
        shares = [entry[f"lemo/kept_share/layer_{layer}"] for layer in range(LAYERS)]
        assert shares == sorted(shares, reverse=True) and shares[0] > shares[-1]
        assert entry["lemo/kept_share"] == pytest.approx(sum(shares) / LAYERS)


class DuringTraining(TrainerCallback):
    """Evaluates in the middle of training, as a user's callback may."""

    def __init__(self):
        self.found = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        ids = torch.arange(5, 45)[None]
        twin = llama(torch.float32)
        twin.load_state_dict(model.state_dict())
        model.eval(), twin.eval()
        with torch.no_grad():
            self.found.append(torch.equal(model(input_ids=ids).logits, twin(input_ids=ids).logits))
        model.train()


def test_evaluation_sees_the_original_and_all_is_given_back(tmp_path):
    model, watch = llama(torch.float32), DuringTraining()
    args = arguments(tmp_path, None, lemo=fields(), eval_strategy="steps", eval_steps=2)
    own = run(model, args, TokenSeekTrainer, callbacks=[watch])
    assert watch.found == [True] * 4
    assert model.config._attn_implementation == "sdpa" and not model.base_model._forward_hooks
    assert not any("forward" in vars(layer) for layer in layers_of(model))
    found = own.evaluate()["eval_loss"]
    evaluated = [entry["eval_loss"] for entry in own.state.log_history if "eval_loss" in entry]
    assert len(evaluated) == 3 and evaluated[1] == found
    own.train()  # and it can be attached again
    assert "lemo/kept_share" in logs(own)[-1]


def test_another_model_from_model_init_is_attached(tmp_path):
    args = arguments(tmp_path, None, lemo=fields())
    own, stock = (
        run(None, args, kind, callbacks=callbacks, model_init=lambda: llama(torch.float32))
        for kind, callbacks in ((TokenSeekTrainer, ()), (Trainer, [LemoCallback(lemo())]))
    )
    assert_same(own, stock)
    assert all("lemo/kept_share" in entry for entry in logs(own))


def test_adapters_with_checkpointing_are_the_same_run(tmp_path):
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(llama(torch.float32), lora(lora_dropout=0.1))
        how = {"gradient_checkpointing": checkpointing, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
        found.append(own_run(tmp_path, fields(), model=model, **how))
    assert losses(found[0]) == pytest.approx(losses(found[1]), rel=1e-6)


def test_the_model_card_has_the_configuration(tmp_path):
    own = own_run(tmp_path, fields(), max_steps=1, save_strategy="steps", save_steps=1)
    own.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-1"):
        assert LemoConfig(**options_in(ModelCard.load(folder / "README.md"))["lemo"]) == lemo()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"torch_compile": True}, "torch_compile=True"),
        ({"use_liger_kernel": True}, "use_liger_kernel=True"),
        ({"label_smoothing_factor": 0.1}, r"label_smoothing_factor=0.1.*loss='all'"),
    ],
)
def test_arguments_that_it_does_not_know_are_refused(tmp_path, options, said):
    for build in (
        lambda: trainer(llama(torch.float32), arguments(tmp_path, None, lemo=fields(), **options)),
        lambda: trainer(
            llama(torch.float32), arguments(tmp_path, **options), kind=Trainer, callbacks=[LemoCallback(lemo())]
        ),
    ):
        with pytest.raises(ValueError, match=f"LeMo does not support {said}"):
            build()


def test_label_smoothing_goes_where_all_labels_count(tmp_path):
    smooth = {"label_smoothing_factor": 0.1}
    assert_same(own_run(tmp_path, fields(loss="all", keep=1.0), **smooth), stock_run(tmp_path, **smooth))
    assert losses(own_run(tmp_path, fields(loss="all"), **smooth)) != losses(stock_run(tmp_path, **smooth))


@pytest.mark.parametrize("option", [{"mode": "detach"}, {"loss": "all"}], ids=str)
def test_what_means_nothing_with_seek_is_refused(tmp_path, option):
    [(name, value)] = option.items()
    said = f"LeMo's {name}={value!r} does not go with TokenSeek.*Set {name}="
    with pytest.raises(ValueError, match=said):
        trainer(llama(torch.float32), arguments(tmp_path, SELECTS, lemo=fields(**option)))
    callbacks = [LemoCallback(fields(**option)), SeekCallback(SELECTS)]
    with pytest.raises(ValueError, match=said):
        stock_run(tmp_path, *callbacks)
