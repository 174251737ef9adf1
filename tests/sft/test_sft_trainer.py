"""`TokenSeekSFTTrainer`: a drop-in for `SFTTrainer`, and `SeekCallback` in a stock one is the same."""

import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    HfArgumentParser,
    MixtralConfig,
    MixtralForCausalLM,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from hf_tokenseek import (
    LeanCallback,
    MemoryCallback,
    SeekCallback,
    SeekConfig,
    TokenSeekArguments,
    TokenSeekSFTConfig,
    TokenSeekSFTTrainer,
    attach,
)
from hf_tokenseek.memory import SavedActivations
from tests.sft.tiny_sft import (
    EVERYTHING,
    SELECTS,
    arguments,
    logged,
    prompt_completion,
    run,
    tokenizer,
    trainer,
    words,
)

SEEK_KEYS = {"seek/selected_share", "seek/labelled_share", "seek/plain_share"}
COST_KEYS = {"memory/saved_activations_mib", "speed/step_seconds", "speed/tokens_per_second"}
TRL_KEYS = {"loss", "entropy", "mean_token_accuracy", "num_tokens"}


def parameters_equal(one, other) -> bool:
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("kind", [SFTConfig, TrainingArguments])
def test_plain_arguments_train_with_the_defaults_and_log_it(tiny_llama, tmp_path, kind):
    args = kind(str(tmp_path), max_steps=2, logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
    own = run(tiny_llama(), args)
    [callback] = [c for c in own.callback_handler.callbacks if isinstance(c, SeekCallback)]
    assert callback.config == SeekConfig() and callback.handle.metrics.total == 2
    entries = [entry for entry in own.state.log_history if "loss" in entry]
    assert len(entries) == 2 and all(set(e) >= SEEK_KEYS | COST_KEYS | TRL_KEYS for e in entries)


def test_model_may_be_a_folder(tiny_llama, tmp_path):
    """As in trl, which then loads the tokenizer too."""
    tiny_llama().save_pretrained(tmp_path / "saved")
    tokenizer().save_pretrained(tmp_path / "saved")
    args = arguments(tmp_path, SELECTS)
    own = TokenSeekSFTTrainer(str(tmp_path / "saved"), args, train_dataset=prompt_completion())
    own.train()
    assert logged(own, "loss") == logged(run(tiny_llama(), args), "loss")


def test_none_is_a_stock_run(tiny_llama, tmp_path):
    own = run(tiny_llama(), arguments(tmp_path, None))
    stock = run(tiny_llama(), arguments(tmp_path), kind=SFTTrainer)
    assert logged(own, *TRL_KEYS) == logged(stock, *TRL_KEYS) and parameters_equal(own.model, stock.model)
    assert not any(key.startswith("seek/") for entry in own.state.log_history for key in entry)


@pytest.mark.parametrize(
    "seek", [SELECTS, {"ratio": 0.3, "score": "random", "plain_fallback": False}], ids=["stages", "ratio"]
)
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_callback_in_the_stock_trainer_is_the_same_training(tiny_llama, tmp_path, seek, bf16):
    own = run(tiny_llama(), arguments(tmp_path, seek, bf16=bf16))
    stock = run(tiny_llama(), arguments(tmp_path, bf16=bf16), kind=SFTTrainer, callbacks=[SeekCallback(seek)])
    keys = sorted(TRL_KEYS | SEEK_KEYS)
    assert logged(own, *keys) == logged(stock, *keys) and parameters_equal(own.model, stock.model)
    assert max(logged(stock, "seek/selected_share")[0]) < 0.5


@pytest.mark.parametrize("kind", [TokenSeekSFTTrainer, SFTTrainer])
def test_bf16_is_as_near_to_float32_as_the_stock_trainer(tiny_llama, tmp_path, kind):
    """Everything selected in bf16 autocast, against a stock run in float32: the stock run in bf16 sets the measure."""
    truth, stock = (run(tiny_llama(), arguments(tmp_path, bf16=b), kind=SFTTrainer) for b in (False, True))
    callbacks = [SeekCallback(EVERYTHING)] if kind is SFTTrainer else None
    args = arguments(tmp_path, "stock" if callbacks else EVERYTHING, bf16=True)
    own = run(tiny_llama(), args, kind=kind, callbacks=callbacks)
    assert set(logged(own, "seek/plain_share")[0]) == {0.0}
    for key in ("loss", "entropy", "grad_norm"):
        found, plain, exact = (torch.tensor(logged(r, key)[0]) for r in (own, stock, truth))
        # one rounding to bf16 beside the stock run's own error
        assert ((found - exact).abs() <= 2 * (plain - exact).abs().max() + 2**-9 * exact).all(), key


def test_evaluation_is_the_stock_one(tiny_llama, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2}
    own = trainer(tiny_llama(), arguments(tmp_path, SELECTS, **options), eval_dataset=prompt_completion(6))
    own.train()
    twin = tiny_llama()
    twin.load_state_dict(own.model.state_dict())
    stock = trainer(twin, arguments(tmp_path), kind=SFTTrainer, eval_dataset=prompt_completion(6))
    found, truth = own.evaluate(), stock.evaluate()
    last = [entry for entry in own.state.log_history if "eval_loss" in entry][-1]
    for key in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert found.get(key, last[key]) == pytest.approx(truth.get(key, stock.state.log_history[-1][key]), rel=1e-6)
    assert len([entry for entry in own.state.log_history if "eval_loss" in entry]) == 3


def test_model_is_given_back(tiny_llama, tmp_path):
    """After training, generation, saving and a second, stock trainer see the model as trl left it."""
    model = tiny_llama()
    before = model.config.to_dict()
    own = run(model, arguments(tmp_path, SELECTS))
    ids = torch.tensor([tokenizer()(words(3, 20))["input_ids"]])
    own.save_model(str(tmp_path / "final"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final").eval()
    model.eval()
    assert torch.equal(model(input_ids=ids).logits, loaded(input_ids=ids).logits)
    assert torch.equal(*(m.generate(ids, max_new_tokens=4, do_sample=False) for m in (model, loaded)))
    assert "tokenseek" not in json.dumps(model.config.to_dict()) and model.config._attn_implementation == "sdpa"
    assert model.config.to_dict().keys() == before.keys() | {"dtype", "architectures"}
    stock = run(model.train(), arguments(tmp_path), kind=SFTTrainer)
    fresh = run(loaded.train(), arguments(tmp_path), kind=SFTTrainer)
    assert logged(stock, "loss") == logged(fresh, "loss")


def test_training_twice_and_resuming_go_on(tiny_llama, tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
    seek = {"ratio": 0.4, "score": "random", "plain_fallback": False}
    whole = run(tiny_llama(), arguments(tmp_path, seek, **options))
    resumed = trainer(tiny_llama(), arguments(tmp_path, seek, **options))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert logged(resumed, "loss") == logged(whole, "loss") and parameters_equal(resumed.model, whole.model)
    twice, stock = (
        trainer(tiny_llama(), args, kind=kind)
        for args, kind in ((arguments(tmp_path, EVERYTHING), TokenSeekSFTTrainer), (arguments(tmp_path), SFTTrainer))
    )
    for _ in range(2):
        twice.train()
        stock.train()
        assert logged(twice, "loss")[0] == pytest.approx(logged(stock, "loss")[0], rel=1e-5)
        assert set(logged(twice, "seek/selected_share")[0]) == {1.0}


class Passes(TrainerCallback):
    """Counts how often the first layer runs."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.passes = 0
        model.model.layers[0].register_forward_hook(self.count)

    def count(self, *_):
        self.passes += 1


@pytest.mark.parametrize("seek, passes", [(SELECTS, 2), ({"context": 1.0}, 1)], ids=["selected", "plain"])
def test_no_pass_more_than_scouting_and_ditching(tiny_llama, tmp_path, seek, passes):
    """trl's entropy and accuracy come from the pass that is trained."""
    counter = Passes()
    own = run(tiny_llama(), arguments(tmp_path, seek, gradient_checkpointing=False), callbacks=[counter])
    assert counter.passes == passes * 4 and logged(own, "entropy")[0][0] > 0


def test_no_logits_are_kept(tiny_llama, tmp_path):
    """Saved bytes are those of TokenSeek's own head: trl's keeps hidden states of the rows, and a few numbers each."""
    model = tiny_llama()
    own = trainer(model, arguments(tmp_path, SELECTS, gradient_checkpointing=False))
    batch = next(iter(own.get_train_dataloader()))
    counts = []
    # building the trainer has attached TokenSeek
    for fused in ({"fused_lm_head": True}, {}):
        with SavedActivations(model) as counted:
            output = model(**batch, **fused)
            counts.append(counted.bytes)
        if fused:
            assert output.log_probs.shape == (2, batch["input_ids"].shape[1] - 1) and output.get("logits") is None
        del output
    [callback] = [c for c in own.callback_handler.callbacks if isinstance(c, SeekCallback)]
    rows = callback.handle.selection.numel()
    # each row: hidden state, label, two statistics, weight, mask, the token it goes back to; logits would be 512 bytes
    assert counts[0] - counts[1] <= rows * (32 * 4 + 8 + 4 + 4 + 4 + 1 + 8)


def test_memory_callback_sees_the_selected_pass_in_any_order(tiny_llama, tmp_path):
    key, args = "memory/saved_activations_mib", arguments(tmp_path, gradient_checkpointing=False)
    own = run(tiny_llama(), arguments(tmp_path, SELECTS, gradient_checkpointing=False))
    plain = run(tiny_llama(), args, kind=SFTTrainer, callbacks=[MemoryCallback()])
    for callbacks in ([SeekCallback(SELECTS), MemoryCallback()], [MemoryCallback(), SeekCallback(SELECTS)]):
        stock = run(tiny_llama(), args, kind=SFTTrainer, callbacks=callbacks)
        assert logged(stock, key) == logged(own, key)
    assert max(logged(own, key)[0]) < min(logged(plain, key)[0]) / 2


def test_lean_layers_compute_the_same(tiny_llama, tmp_path):
    stock = run(tiny_llama(), arguments(tmp_path), kind=SFTTrainer)
    lean = run(tiny_llama(), arguments(tmp_path, EVERYTHING, lean=True))
    assert any(isinstance(c, LeanCallback) for c in lean.callback_handler.callbacks)
    for key in TRL_KEYS:
        assert logged(lean, key)[0] == pytest.approx(logged(stock, key)[0], rel=1e-4, abs=1e-6), key


def test_micro_batch_without_labels_is_a_connected_zero(tiny_llama, tmp_path):
    model = tiny_llama()
    own = trainer(model, arguments(tmp_path, SELECTS))
    batch = next(iter(own.get_train_dataloader()))
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = own.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(7))
    loss.backward()
    assert loss == 0 and all(p.grad is not None and not p.grad.any() for p in model.parameters())
    assert own._metrics["train"]["entropy"] == [0.0]


@pytest.mark.parametrize("layout", [{}, {"packing": True, "max_length": 64}], ids=["padded", "packed"])
def test_compacted_head_of_gpus_gives_the_same(tiny_llama, tmp_path, monkeypatch, layout):
    """There trl's head reads the labelled rows only."""
    everywhere = run(tiny_llama(), arguments(tmp_path, SELECTS, **layout))
    monkeypatch.setattr("trl.trainer.utils._use_triton", lambda device: True)
    compacted = run(tiny_llama(), arguments(tmp_path, SELECTS, **layout))
    for key in TRL_KEYS:
        assert logged(compacted, key)[0] == pytest.approx(logged(everywhere, key)[0], rel=1e-6), key


def test_probe_compares_with_the_full_gradient(tiny_llama, tmp_path):
    own = run(tiny_llama(), arguments(tmp_path, {**SELECTS, "probe_steps": 2}))
    probed = [e["seek/gradient_cosine"] for e in own.state.log_history if "seek/gradient_cosine" in e]
    assert len(probed) == 2 and all(0 < cosine < 1 for cosine in probed)
    assert logged(own, "loss") == logged(run(tiny_llama(), arguments(tmp_path, SELECTS)), "loss")


def test_method_fields_are_those_of_tokenseek_arguments(tmp_path):
    own, other = TokenSeekSFTConfig.__dataclass_fields__, TokenSeekArguments.__dataclass_fields__
    extra = set(other) - set(TrainingArguments.__dataclass_fields__)
    assert (
        extra
        == {"seek", "lemo", "velora", "ist", "lean", "mlp_tiles"}
        == set(own) - set(SFTConfig.__dataclass_fields__)
    )
    config = TokenSeekSFTConfig(str(tmp_path), seek='{"context": 0.3}', use_cpu=True)
    assert config.seek == SeekConfig(context=0.3) and json.loads(config.to_json_string())["seek"]["context"] == 0.3
    assert config.gradient_checkpointing and config.learning_rate == 2e-5
    with pytest.raises(ValueError, match="unknown fields .'contxt'."):
        TokenSeekSFTConfig(str(tmp_path), seek={"contxt": 0.3})
    parser = HfArgumentParser(TokenSeekSFTConfig)
    line = ["--seek", '{"context": 0.3}', "--lean", "--packing", "--use_cpu", "--output_dir", str(tmp_path)]
    [parsed] = parser.parse_args_into_dataclasses(line)
    assert parsed.seek == config.seek and parsed.lean and parsed.packing
    assert "--seek SEEK" in parser.format_help()


def test_losses_that_bypass_seek_are_refused(tiny_llama, tmp_path):
    with pytest.raises(ValueError, match="does not support `compute_loss_func`.*set seek=None"):
        trainer(tiny_llama(), arguments(tmp_path, SELECTS), compute_loss_func=lambda *_: 0.0)
    with pytest.raises(ValueError, match="`label_smoothing_factor`=0.1.*Set label_smoothing_factor=0.0"):
        trainer(tiny_llama(), arguments(tmp_path, SELECTS, label_smoothing_factor=0.1))
    stock = trainer(
        tiny_llama(),
        arguments(tmp_path),
        kind=SFTTrainer,
        callbacks=[SeekCallback()],
        compute_loss_func=lambda outputs, labels, num_items_in_batch: outputs.logits.sum(),
    )
    with pytest.raises(ValueError, match="needs `labels`.*set label_smoothing_factor=0 and compute_loss_func=None"):
        stock.train()


def test_tokenseek_arguments_are_refused_by_name(tiny_llama, tmp_path):
    with pytest.raises(ValueError, match="got TokenSeekArguments.*Pass the same fields to TokenSeekSFTConfig"):
        trainer(tiny_llama(), TokenSeekArguments(str(tmp_path), seek=SELECTS))


def test_attached_model_is_not_trained_without_tokenseek(tiny_llama, tmp_path):
    """trl replaces the forward of a model that was attached by hand: an error instead of plain training."""
    model = tiny_llama()
    with attach(model, seek=SELECTS):
        stock = trainer(model, arguments(tmp_path), kind=SFTTrainer)
        with pytest.raises(ValueError, match="was about to train without TokenSeek.*Attach by SeekCallback"):
            stock.train()
    assert len(logged(run(model, arguments(tmp_path), kind=SFTTrainer), "loss")[0]) == 4


def test_the_routers_loss_is_refused_before_training(tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    config = MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)
    with pytest.raises(ValueError, match="router_aux_loss_coef=0.001.*Set router_aux_loss_coef=0.0"):
        trainer(MixtralForCausalLM(config), arguments(tmp_path, SELECTS))
    without = {"router_aux_loss_coef": 0.0}
    stock = run(MixtralForCausalLM(config).float(), arguments(tmp_path, learning_rate=0.0, **without), kind=SFTTrainer)
    own = trainer(MixtralForCausalLM(config), arguments(tmp_path, SELECTS, learning_rate=0.0, **without))
    own.model.load_state_dict(stock.model.state_dict())
    own.train()
    assert logged(own, "loss")[0] == pytest.approx(logged(stock, "loss")[0], rel=1e-4)
