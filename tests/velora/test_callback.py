"""`VeloraCallback` and the field `velora`: what they log, that a resumed run is the same run, and what they refuse."""

import json

import pytest
import torch
from peft import get_peft_model
from torch.optim import SGD
from transformers import Trainer, TrainerCallback

from hf_tokenseek import LeanCallback, SeekCallback, TokenSeekTrainer, VeloraCallback, VeloraConfig, attach
from hf_tokenseek.velora import VeloraAdamW
from hf_tokenseek.velora.layers import VeloraLinear
from tests.peft.tiny_peft import lora
from tests.tiny_training import SELECTS, arguments, examples, logs, losses, pad, trainer, weights

FEW, ALL = {"groups": 4}, {"groups": 80}
CHECKPOINTED = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 3, "max_steps": 5}


def run(model, args, kind=Trainer, resume=None, callbacks=(), **options):
    own = trainer(model, args, kind=kind, callbacks=list(callbacks), **options)
    own.train(resume_from_checkpoint=resume)
    return own


def own_run(model, folder, velora, resume=None, callbacks=(), **options):
    """A run of `TokenSeekTrainer` without token selection."""
    return run(model, arguments(folder, None, velora=velora, **options), TokenSeekTrainer, resume, callbacks)


def assert_same(first, second):
    assert losses(first) == losses(second)
    for (name, a), b in zip(first.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_off_is_said_where_it_is_asked_for():
    with pytest.raises(ValueError, match="Leave it out of `callbacks`"):
        VeloraCallback(False)
    assert VeloraCallback({"groups": 4}).config == VeloraConfig(groups=4) and VeloraCallback().config == VeloraConfig()


def test_stock_trainer_with_the_callback_is_our_trainer(tiny_llama, tmp_path, capsys):
    stock = run(tiny_llama(), arguments(tmp_path), callbacks=[VeloraCallback(FEW)])
    table = capsys.readouterr().out
    assert "VeLoRA on LlamaForCausalLM: groups=4, projector=average, rank=1\n" in table and "down_proj" in table
    own = own_run(tiny_llama(), tmp_path, FEW)
    assert_same(stock, own)
    assert losses(own) != losses(run(tiny_llama(), arguments(tmp_path)))
    assert all("velora/saved_mib" in entry for entry in logs(stock) + logs(own))


@pytest.mark.parametrize("projector", ["average", "random", "mixed"])
def test_as_many_groups_as_features_train_plainly(tiny_llama, tmp_path, projector):
    """A direction is a sign then, and signs lose nothing."""
    sgd = {"optim": "sgd", "learning_rate": 0.5, "gradient_accumulation_steps": 2}
    plain = run(tiny_llama(), arguments(tmp_path, **sgd))
    own = run(tiny_llama(), arguments(tmp_path, **sgd), callbacks=[VeloraCallback({**ALL, "projector": projector})])
    assert losses(own) == losses(plain)
    for p, q in zip(own.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_figures_are_in_trainer_state_json(tiny_llama, tmp_path):
    velora = {**FEW, "probe_steps": 2}
    own_run(tiny_llama(), tmp_path, velora, save_strategy="steps", save_steps=4)
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    entries = [entry for entry in state["log_history"] if "loss" in entry]
    probed = [{"velora/retained_energy", "velora/gradient_cosine"} <= set(entry) for entry in entries]
    assert probed == [True, False, True, False]
    # float32, two sequences padded to the longer one: of each input, as wide as it is, four numbers a token are kept
    saved = {tokens * 2 * 3 * 4 * (2 * (32 - 4) + 80 - 4) / 2**20 for tokens in (20, 24, 28)}
    assert all(any(abs(entry["velora/saved_mib"] - s) < 1e-12 for s in saved) for entry in entries)
    for entry in entries[::2]:
        assert 0 < entry["velora/retained_energy"] < 1 and 0 < entry["velora/gradient_cosine"] < 1


def test_probing_changes_nothing(tiny_llama, tmp_path):
    probed = run(tiny_llama(), arguments(tmp_path), callbacks=[VeloraCallback({**FEW, "probe_steps": 1})])
    assert_same(probed, run(tiny_llama(), arguments(tmp_path), callbacks=[VeloraCallback(FEW)]))
    exact = run(tiny_llama(), arguments(tmp_path), callbacks=[VeloraCallback({**ALL, "probe_steps": 1})])
    for entry in logs(exact):
        assert entry["velora/retained_energy"] == pytest.approx(1, abs=1e-6)
        assert entry["velora/gradient_cosine"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("compressed_state", [False, True])
def test_model_is_given_back(tiny_llama, tmp_path, compressed_state):
    model = tiny_llama()
    before = {name: type(module) for name, module in model.named_modules()}
    names, batch = [name for name, _ in model.named_parameters()], pad(examples(4))
    own = trainer(model, arguments(tmp_path, None, velora={**FEW, "compressed_state": compressed_state}))
    assert sum(type(module) is VeloraLinear for module in model.modules()) == 3 * 6
    own.train()
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert [name for name, _ in model.named_parameters()] == names
    assert all(p.requires_grad for p in model.parameters())
    model.train().zero_grad()
    twin = tiny_llama()
    twin.load_state_dict(model.state_dict())
    for each in (model, twin):
        each(**batch).loss.backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


VARIANTS = {
    "average": {"refresh_steps": 2},
    "random": {"projector": "random", "refresh_steps": 2},
    "mixed": {"projector": "mixed"},
    "compressed": {"compressed_state": True},
    "compressed-refreshed": {"compressed_state": True, "refresh_steps": 2},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_run_equals_uninterrupted(tiny_llama, tmp_path, variant):
    """In another folder, to the bit."""
    velora = {**FEW, **VARIANTS[variant]}
    whole = own_run(tiny_llama(), tmp_path / "run", velora, **CHECKPOINTED)
    assert len(losses(whole)) == 5
    elsewhere = own_run(
        tiny_llama(), tmp_path / "other", velora, str(tmp_path / "run" / "checkpoint-3"), **CHECKPOINTED
    )
    assert_same(elsewhere, whole)


def test_resumed_stock_trainer_equals_uninterrupted(tiny_llama, tmp_path):
    args, velora = arguments(tmp_path, **CHECKPOINTED), {**FEW, "projector": "mixed", "refresh_steps": 2}
    whole = run(tiny_llama(), args, callbacks=[VeloraCallback(velora)])
    checkpoint = str(tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-5").rename(tmp_path / "last")
    assert_same(run(tiny_llama(), args, resume=True, callbacks=[VeloraCallback(velora)]), whole)
    callback = VeloraCallback(velora)
    callback.checkpoint = checkpoint
    other = arguments(tmp_path / "other", **CHECKPOINTED)
    assert_same(run(tiny_llama(), other, resume=checkpoint, callbacks=[callback]), whole)


@pytest.mark.parametrize("compressed_state", [False, True])
def test_resumed_adapters_equal_uninterrupted(tiny_llama, tmp_path, compressed_state):
    """PEFT loads adapters by another way, which trains their weights again; dropout draws the same masks."""

    def adapted():
        torch.manual_seed(1)
        return get_peft_model(tiny_llama(), lora(target_modules="all-linear", lora_dropout=0.1))

    velora = {**FEW, "refresh_steps": 2, "compressed_state": compressed_state}
    whole = own_run(adapted(), tmp_path / "run", velora, **CHECKPOINTED)
    resumed = own_run(adapted(), tmp_path / "other", velora, str(tmp_path / "run" / "checkpoint-3"), **CHECKPOINTED)
    assert_same(resumed, whole)
    saved = json.loads((tmp_path / "run" / "checkpoint-3" / "adapter_config.json").read_text())
    assert "velora" not in str(saved["target_modules"])


def test_state_that_does_not_fit_is_refused(tiny_llama, tmp_path):
    def resume(velora=FEW):
        return own_run(tiny_llama(), tmp_path, velora, str(tmp_path / "checkpoint-3"), **CHECKPOINTED)

    own_run(tiny_llama(), tmp_path, FEW, **CHECKPOINTED)
    file = tmp_path / "checkpoint-3" / "velora.pt"
    assert not list(tmp_path.glob("checkpoint-*/*.tmp"))
    resume({**FEW, "probe_steps": 1})
    for other, changed in (({"groups": 8}, "groups"), ({**FEW, "projector": "random"}, "projector")):
        with pytest.raises(ValueError, match=f"another VeLoRA configuration: .*{changed}.*Resume with the config"):
            resume(other)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="velora.pt cannot be read .*Resume from an older checkpoint"):
        resume()
    file.unlink()
    with pytest.raises(ValueError, match="has no velora.pt: .*Resume from an older checkpoint, or turn VeLoRA off"):
        resume()


def test_state_of_another_model_is_refused(tiny_llama, tmp_path):
    whole = own_run(tiny_llama(), tmp_path, FEW, **CHECKPOINTED)
    state = torch.load(tmp_path / "checkpoint-3" / "velora.pt", weights_only=True)
    own = trainer(whole.model, arguments(tmp_path, None, velora=FEW))
    own.model.model.layers[0].mlp.requires_grad_(False)
    [callback] = [c for c in own.callback_handler.callbacks if isinstance(c, VeloraCallback)]
    state["directions"].pop("model.layers.1.down")
    with pytest.raises(ValueError, match=r"another model: .*model.layers.1.down"):
        callback.handle.load_state_dict(state)


def test_compressed_state_needs_its_optimizer(tiny_llama, tmp_path):
    velora = {**FEW, "compressed_state": True}
    with pytest.raises(ValueError, match="needs VeloraAdamW, got AdamW.*optimizer_cls_and_kwargs="):
        run(tiny_llama(), arguments(tmp_path), callbacks=[VeloraCallback(velora)])
    model = tiny_llama()
    with pytest.raises(ValueError, match="needs VeloraAdamW, got SGD"):
        own = arguments(tmp_path, None, velora=velora)
        run(model, own, TokenSeekTrainer, optimizers=(SGD(model.parameters(), 0.1), None))
    given = {"optimizer_cls_and_kwargs": (VeloraAdamW, {"lr": 1e-2, "fused": True})}
    stock = run(tiny_llama(), arguments(tmp_path), callbacks=[VeloraCallback(velora)], **given)
    assert_same(stock, own_run(tiny_llama(), tmp_path, velora))


@pytest.mark.parametrize("optim", ["adafactor", "sgd"])
def test_compressed_state_is_adamws(tiny_llama, tmp_path, optim):
    with pytest.raises(ValueError, match=f"needs AdamW, got optim='?.*{optim}.*Set optim='adamw_torch'"):
        own_run(tiny_llama(), tmp_path, {**FEW, "compressed_state": True}, optim=optim)


def test_optimizer_of_other_parameters_is_refused(tiny_llama, tmp_path):
    """One that was built before the layers were swapped would train nothing of them."""
    model, velora = tiny_llama(), {**FEW, "compressed_state": True}
    early = VeloraAdamW(model.parameters(), lr=1e-2)
    with pytest.raises(ValueError, match="does not have the compressed gradients of model.layers.0"):
        run(model, arguments(tmp_path, None, velora=velora), TokenSeekTrainer, optimizers=(early, None))


@pytest.mark.parametrize("compressed_state", [False, True])
def test_compressed_state_is_the_same_training(tiny_llama, tmp_path, compressed_state):
    """AdamW on the dense gradient and on the compressed one; the moments are as small as they should be."""
    own = own_run(tiny_llama(), tmp_path, {**FEW, "compressed_state": compressed_state}, max_grad_norm=0.5)
    dense = own_run(tiny_llama(), tmp_path, FEW, max_grad_norm=0.5)
    assert losses(own) == pytest.approx(losses(dense), rel=1e-5)
    for p, q in zip(own.model.parameters(), dense.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    moments = sum(s["exp_avg"].numel() for s in own.optimizer.state.values())
    whole = sum(p.numel() for p in own.model.parameters())
    layer = (32 + 2 * 16) * 32 + 2 * 80 * 32 + 32 * 80, ((32 + 2 * 16) + 2 * 80 + 32) * 4
    assert moments == (whole - 3 * (layer[0] - layer[1]) if compressed_state else whole)


def test_training_twice_goes_on(tiny_llama, tmp_path):
    own = trainer(tiny_llama(), arguments(tmp_path, None, velora=ALL, optim="sgd"))
    plain = trainer(tiny_llama(), arguments(tmp_path, optim="sgd"), kind=Trainer)
    for _ in range(2):
        own.train()
        plain.train()
        assert losses(own) == pytest.approx(losses(plain), rel=1e-6)
    assert all("velora/saved_mib" in entry for entry in logs(own)[-4:])


def test_training_twice_with_a_compressed_state_is_refused(tiny_llama, tmp_path):
    """The trainer keeps its optimizer, which does not know the new compressed gradients; a new trainer makes one."""
    own = trainer(tiny_llama(), arguments(tmp_path, None, velora={**FEW, "compressed_state": True}))
    own.train()
    first = losses(own)[0]
    with pytest.raises(ValueError, match="does not have the compressed gradients.*build a new trainer"):
        own.train()
    again = trainer(own.model, own.args)
    again.train()
    assert losses(again)[-1] < first


@pytest.mark.parametrize("velora", [FEW, {**FEW, "compressed_state": True}])
def test_model_init_is_the_same_training(tiny_llama, tmp_path, velora):
    # building a model draws from the generator that shuffles
    args = arguments(tmp_path, None, velora=velora, train_sampling_strategy="sequential")
    made = TokenSeekTrainer(model_init=tiny_llama, args=args, train_dataset=examples(), data_collator=pad)
    made.train()
    given = trainer(tiny_llama(), args)
    given.train()
    assert_same(made, given)


def test_evaluation_during_training_is_plain(tiny_llama, tmp_path):
    evaluated = []

    class Twin(TrainerCallback):
        def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs):
            twin = tiny_llama()
            twin.load_state_dict(model.state_dict())
            stock = trainer(twin, arguments(tmp_path / "twin"), kind=Trainer)
            evaluated.append((metrics["eval_loss"], stock.evaluate()["eval_loss"]))

    options = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}
    own = own_run(tiny_llama(), tmp_path, FEW, callbacks=[Twin()], **options)
    assert len(evaluated) == 3 and all(ours == stock for ours, stock in evaluated)
    assert losses(own) == losses(own_run(tiny_llama(), tmp_path, FEW))


@pytest.mark.parametrize("velora", [FEW, {**FEW, "projector": "random"}], ids=["average", "random"])
def test_the_order_of_the_callbacks_does_not_matter(tiny_llama, tmp_path, velora):
    first = run(tiny_llama(), arguments(tmp_path), callbacks=[VeloraCallback(velora), SeekCallback(SELECTS)])
    second = run(tiny_llama(), arguments(tmp_path), callbacks=[SeekCallback(SELECTS), VeloraCallback(velora)])
    assert_same(first, second)
    alone = run(tiny_llama(), arguments(tmp_path), callbacks=[SeekCallback(SELECTS)])
    # the first loss is that of the same weights; from the second on another gradient has been applied
    assert losses(first)[0] == losses(alone)[0] and losses(first)[1] != losses(alone)[1]
    assert all({"velora/saved_mib", "seek/selected_share"} <= set(entry) for entry in logs(first) + logs(second))


def test_the_order_with_lean_layers_does_not_matter(tiny_llama, tmp_path):
    alone = run(tiny_llama(), arguments(tmp_path), callbacks=[VeloraCallback(FEW)])
    for callbacks in ([LeanCallback(), VeloraCallback(FEW)], [VeloraCallback(FEW), LeanCallback()]):
        model = tiny_llama()
        kinds = [type(module) for module in model.modules()]
        own = run(model, arguments(tmp_path), callbacks=callbacks)
        assert losses(own) == pytest.approx(losses(alone), rel=1e-5)
        assert [type(module) for module in model.modules()] == kinds
        assert not any(hasattr(module, "velora_input") for module in model.modules())


def test_checkpointing_changes_nothing(tiny_llama, tmp_path):
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    own = own_run(tiny_llama(), tmp_path, FEW, optim="sgd", learning_rate=0.5, **options)
    kept = own_run(tiny_llama(), tmp_path, FEW, optim="sgd", learning_rate=0.5)
    assert losses(own) == pytest.approx(losses(kept), rel=1e-6)
    assert [entry["velora/saved_mib"] for entry in logs(own)] == [entry["velora/saved_mib"] for entry in logs(kept)]


def test_bfloat16_autocast_is_plain_training_but_for_rounding(tiny_llama, tmp_path):
    """All groups: off the float32 losses by no more than twice what plain bfloat16 is off."""
    sgd = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 6}
    truth = losses(run(tiny_llama(), arguments(tmp_path, **sgd)))
    plain = losses(run(tiny_llama(), arguments(tmp_path, bf16=True, **sgd)))
    own = own_run(tiny_llama(), tmp_path, ALL, bf16=True, **sgd)
    assert own.model.dtype == torch.float32 and losses(own) != truth
    for found, half, exact in zip(losses(own), plain, truth, strict=True):
        assert abs(found - exact) <= 2 * abs(half - exact) + 2**-9 * exact


@pytest.mark.parametrize("whole", [False, True], ids=["autocast", "weights"])
def test_bfloat16_trains_with_a_compressed_state(tiny_llama, tmp_path, whole):
    model = tiny_llama().bfloat16() if whole else tiny_llama()
    own = own_run(model, tmp_path, {**FEW, "compressed_state": True}, bf16=True, max_steps=6)
    assert losses(own)[-1] < losses(own)[0] and all(torch.isfinite(p).all() for p in own.model.parameters())


def test_model_card_and_saved_model(tiny_llama, tmp_path):
    own = own_run(tiny_llama(), tmp_path, {**FEW, "compressed_state": True}, **CHECKPOINTED)
    own.save_model(str(tmp_path / "final"))
    card = (tmp_path / "final" / "README.md").read_text()
    options = json.loads(card.partition("```json\n")[2].partition("\n```")[0])
    assert options["velora"]["groups"] == 4 and options["velora"]["compressed_state"] and options["seek"] is None
    for folder in ("checkpoint-5", "final"):
        loaded = type(own.model).from_pretrained(tmp_path / folder)
        assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), own.model.parameters(), strict=True))


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_overflow_are_skipped(tiny_llama, fused):
    """By fp16's loss scaler, as it does for torch's AdamW."""
    model, scaler = tiny_llama(), torch.amp.GradScaler("cpu")
    with attach(model, velora={**FEW, "compressed_state": True}):
        optimizer = VeloraAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=fused)
        for factor in (1.0, float("inf"), 1.0):
            before = weights(model)
            scaler.scale(model(**pad(examples(2))).loss * factor).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            moved = [not torch.equal(p, before[name]) for name, p in model.named_parameters() if "velora" not in name]
            assert all(moved) if factor == 1.0 else not any(moved)
    assert all(torch.isfinite(p).all() for p in model.parameters())
