"""With everything selected, TokenSeek in trl is trl: the same losses step by step, metrics and weights."""

import pytest
import torch
from trl import SFTTrainer

from tests.sft.tiny_sft import (
    EVERYTHING,
    RATIO_ONE,
    SELECTS,
    arguments,
    conversations,
    logged,
    prompt_completion,
    run,
    texts,
)

PADDING_FREE = {"padding_free": True, "max_length": None}
LAYOUTS = {
    "completion-only": (prompt_completion, {}),
    "whole-text": (prompt_completion, {"completion_only_loss": False}),
    "assistant-only": (conversations, {"assistant_only_loss": True}),
    "chat": (conversations, {}),
    "packed": (prompt_completion, {"packing": True, "max_length": 64}),
    "packed-text": (texts, {"packing": True, "max_length": 48}),
    "packed-split": (prompt_completion, {"packing": True, "packing_strategy": "bfd_split", "max_length": 30}),
    "packed-padded": (prompt_completion, {"packing": True, "max_length": 62, "pad_to_multiple_of": 8}),
    "packed-wrapped": (texts, {"packing": True, "packing_strategy": "wrapped", "max_length": 40}),
    "padding-free": (prompt_completion, PADDING_FREE),
    "padding-free-chat": (conversations, {**PADDING_FREE, "assistant_only_loss": True}),
    "truncated": (prompt_completion, {"max_length": 26}),
    "streamed": (lambda: prompt_completion().to_iterable_dataset(), {}),
    "streamed-packed": (lambda: prompt_completion().to_iterable_dataset(), {"packing": True, "max_length": 64}),
    "padded-to-8": (prompt_completion, {"pad_to_multiple_of": 8}),
    "accumulated": (prompt_completion, {"gradient_accumulation_steps": 2}),
    "plain-storage": (prompt_completion, {"gradient_checkpointing": False}),
    "dft": (prompt_completion, {"loss_type": "dft"}),
}
TRL_KEYS = ("loss", "entropy", "mean_token_accuracy", "num_tokens")


def same_run(own, stock):
    for key in TRL_KEYS:
        assert logged(own, key)[0] == pytest.approx(logged(stock, key)[0], rel=1e-5, abs=1e-7), key
    for p, q in zip(own.model.parameters(), stock.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_everything_selected_is_stock_training(tiny_llama, tmp_path, layout):
    data, options = LAYOUTS[layout]
    stock = run(tiny_llama(), arguments(tmp_path, **options), data(), kind=SFTTrainer)
    own = run(tiny_llama(), arguments(tmp_path, EVERYTHING, **options), data())
    assert len(logged(own, "loss")[0]) == 4 and min(logged(own, "grad_norm")[0]) > 0
    assert set(logged(own, "seek/plain_share")[0]) == {0.0}
    same_run(own, stock)


@pytest.mark.parametrize("layout", ["completion-only", "packed"])
def test_ratio_one_and_the_plain_fallback_are_stock_training(tiny_llama, tmp_path, layout):
    data, options = LAYOUTS[layout]
    stock = run(tiny_llama(), arguments(tmp_path, **options), data(), kind=SFTTrainer)
    same_run(run(tiny_llama(), arguments(tmp_path, RATIO_ONE, **options), data()), stock)
    fallback = run(tiny_llama(), arguments(tmp_path, {"context": 1.0}, **options), data())
    assert set(logged(fallback, "seek/plain_share")[0]) == {1.0}
    same_run(fallback, stock)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_selected_rows_have_the_losses_of_the_plain_model(tiny_llama, tmp_path, layout):
    """All loss rows are kept: while the weights do not move, every figure of trl is that of a stock run."""
    data, options = LAYOUTS[layout]
    options = {**options, "learning_rate": 0.0}
    stock = run(tiny_llama(), arguments(tmp_path, **options), data(), kind=SFTTrainer)
    own = run(tiny_llama(), arguments(tmp_path, SELECTS, **options), data())
    for key in TRL_KEYS:
        assert logged(own, key)[0] == pytest.approx(logged(stock, key)[0], rel=1e-5, abs=1e-7), key
    [shares] = logged(own, "seek/selected_share")
    if data is prompt_completion and options.get("completion_only_loss", True):
        assert max(shares) < 0.5 and logged(own, "grad_norm") != logged(stock, "grad_norm")
