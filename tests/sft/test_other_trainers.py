"""trl's other trainers: preference pairs are supported, the rest is refused by name."""

import pytest
import torch
from datasets import Dataset
from transformers import LlamaForSequenceClassification
from trl import DPOConfig, DPOTrainer, GRPOConfig, KTOConfig, RewardConfig, RewardTrainer, RLOOConfig, SFTTrainer
from trl.experimental.gkd import GKDConfig

from hf_tokenseek import SeekCallback, attach
from tests.sft.tiny_sft import EVERYTHING, SELECTS, arguments, logged, tokenizer, trainer, words

FIGURES = (
    "loss", "entropy", "mean_token_accuracy", "num_tokens", "rewards/margins", "rewards/accuracies", "logps/chosen",
    "logps/rejected", "logits/chosen", "logits/rejected",
)  # fmt: skip
SETTINGS = {
    "per_device_train_batch_size": 2,
    "max_steps": 3,
    "logging_steps": 1,
    "optim": "sgd",
    "learning_rate": 0.3,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
}


def pairs(count: int = 12) -> Dataset:
    """Long prompts, two short answers each."""
    rows = [(words(i, 20 + 3 * (i % 4)), words(i + 40, 3 + i % 2), words(i + 70, 4)) for i in range(count)]
    return Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in rows])


def preferences(folder, tiny_llama, seek=None, **options) -> DPOTrainer:
    callbacks = [] if seek is None else [SeekCallback(seek)]
    model, reference = tiny_llama(), tiny_llama()
    with torch.no_grad():
        reference.lm_head.weight.mul_(1.1)
    args = DPOConfig(str(folder), **{**SETTINGS, **options})
    return DPOTrainer(model, reference, args, train_dataset=pairs(), processing_class=tokenizer(), callbacks=callbacks)


OPTIONS = {
    "sigmoid": {},
    "several losses": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
    "length desensitised": {"ld_alpha": 0.5},
    "weighted": {"use_weighting": True},
    "precomputed reference": {"precompute_ref_log_probs": True},
    "plain storage": {"gradient_checkpointing": False},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_everything_selected_is_stock_preference_training(tiny_llama, tmp_path, name):
    runs = [preferences(tmp_path, tiny_llama, seek, **OPTIONS[name]) for seek in (None, EVERYTHING)]
    for run in runs:
        run.train()
    stock, own = runs
    for key in FIGURES:
        assert logged(own, key)[0] == pytest.approx(logged(stock, key)[0], rel=1e-4, abs=1e-6), key
    assert min(logged(own, "grad_norm")[0]) > 0 and set(logged(own, "seek/selected_share")[0]) == {1.0}


def test_selected_context_keeps_every_figure(tiny_llama, tmp_path):
    """All completion tokens are loss rows: log-probabilities are exact, gradients are those of the selected rows."""
    runs = [preferences(tmp_path, tiny_llama, seek, learning_rate=0.0) for seek in (None, SELECTS)]
    for run in runs:
        run.train()
    stock, own = runs
    for key in FIGURES:
        assert logged(own, key)[0] == pytest.approx(logged(stock, key)[0], rel=1e-4, abs=1e-6), key
    assert max(logged(own, "seek/selected_share")[0]) < 0.5 and logged(own, "grad_norm") != logged(stock, "grad_norm")


@pytest.mark.parametrize("seek", [{"labelled": 0.5}, {"ratio": 0.4}], ids=str)
def test_part_of_the_loss_rows_is_refused_where_all_are_needed(tiny_llama, tmp_path, seek):
    with pytest.raises(ValueError, match="DPO compares whole completions.*set labelled=1.0 and ratio=None"):
        preferences(tmp_path, tiny_llama, seek)
    for kind, args, callbacks in (
        (None, arguments(tmp_path, seek, loss_type="dft"), None),
        (SFTTrainer, arguments(tmp_path, loss_type="dft"), [SeekCallback(seek)]),
    ):
        with pytest.raises(ValueError, match="loss_type='dft' weighs each token.*set labelled=1.0 and ratio=None"):
            trainer(tiny_llama(), args, **({"kind": kind} if kind else {}), callbacks=callbacks)


@pytest.mark.parametrize("kind", [KTOConfig, GRPOConfig, RLOOConfig, RewardConfig, GKDConfig])
def test_other_trainers_are_refused_by_their_arguments(tiny_llama, tmp_path, kind):
    args = kind(str(tmp_path), use_cpu=True, bf16=False)
    said = (
        f"does not support the trl trainer that takes {kind.__name__}: .*SFTConfig and DPOConfig. Leave SeekCallback"
    )
    with pytest.raises(ValueError, match=said):
        SeekCallback().on_init_end(args, None, None, model=tiny_llama())


def test_reward_trainer_is_refused_when_it_is_built(tiny_llama, tmp_path):
    config = tiny_llama().config
    config.num_labels = 1
    model = LlamaForSequenceClassification._from_config(config)
    args = RewardConfig(str(tmp_path), **SETTINGS)
    with pytest.raises(ValueError, match="takes RewardConfig: its model scores whole sequences"):
        RewardTrainer(
            model, args, train_dataset=pairs(), processing_class=tokenizer(), callbacks=[SeekCallback(SELECTS)]
        )
    with pytest.raises(ValueError, match="trains causal language models, got LlamaForSequenceClassification"):
        attach(model, seek=True)


def test_trl_without_a_fused_head_is_refused(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_tokenseek.seek.trl.version", lambda package: "1.14.2")
    with pytest.raises(ValueError, match="needs trl 1.16.0 or later, found 1.14.2. Run `pip install -U trl`"):
        trainer(tiny_llama(), arguments(tmp_path, SELECTS))
