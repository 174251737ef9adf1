"""Training arguments that TokenSeek goes along with: with everything selected each is a stock run, loss by loss."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from tests.tiny_training import EVERYTHING, arguments, losses, trainer

CHECKPOINTED = {"gradient_checkpointing": True}
OPTIONS = {
    "bf16": {"bf16": True},
    "fp16": {"fp16": True},
    "adafactor": {"optim": "adafactor"},
    "adamw_8bit": {"optim": "adamw_bnb_8bit"},
    "galore": {"optim": "galore_adamw", "optim_target_modules": ["attn", "mlp"]},
    "apollo": {"optim": "apollo_adamw", "optim_target_modules": ["attn", "mlp"]},
    "checkpointing": CHECKPOINTED,
    "reentrant": {**CHECKPOINTED, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "every second layer": {**CHECKPOINTED, "gradient_checkpointing_kwargs": {"every_n_layers": 2}},
    "offloaded": {**CHECKPOINTED, "gradient_checkpointing_kwargs": {"offload": True}},
    "clipping and schedule": {"max_grad_norm": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 2},
}
NEEDS = {"adamw_8bit": "bitsandbytes", "galore": "galore_torch", "apollo": "apollo_torch"}


@pytest.mark.parametrize("lean", [False, True], ids=["plain layers", "lean layers"])
@pytest.mark.parametrize("name", OPTIONS)
def test_everything_selected_is_a_stock_run(tiny_llama, tmp_path, name, lean):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    if name == "offloaded" and not torch.cuda.is_available():
        pytest.skip("offloading copies to pinned memory, which needs a GPU")
    if name == "every second layer" and "every_n_layers" not in TrainingArguments.__doc__:
        pytest.skip("this transformers checkpoints every layer or none")
    options = OPTIONS[name]
    stock = trainer(tiny_llama(), arguments(tmp_path, **options), kind=Trainer)
    stock.train()
    own = trainer(tiny_llama(), arguments(tmp_path, EVERYTHING, lean=lean, **options))
    own.train()
    # GaLore turns to the gradient's singular vectors; along those without a gradient Adam divides rounding by itself
    tolerance = {"bf16": 2e-2, "fp16": 2e-2, "galore": 1e-3}.get(name, 1e-4)
    assert losses(own) == pytest.approx(losses(stock), rel=tolerance)
    assert losses(own)[0] != losses(own)[-1]
