"""TokenSeek, VeLoRA and sparse tuning in one run: the saved bytes are the product of what each keeps."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_tokenseek import TokenSeekTrainer
from tests.ist.tiny_ist import LAYERS, batch, deep_llama, gated_step
from tests.tiny_training import SELECTS, arguments, logs, losses, trainer

GROUPS, RANK, TOKENS, ROWS = 4, 4, 40, 2
SEEK, VELORA = {"ratio": 0.1, "plain_fallback": False}, {"groups": GROUPS, "inputs": ["down"]}


def adapted(dtype=torch.float64):
    return get_peft_model(deep_llama(dtype), LoraConfig(task_type="CAUSAL_LM", r=RANK, target_modules=["down_proj"]))


def long_batch():
    """Two sequences without padding, labels everywhere."""
    ids = batch(ROWS, TOKENS)["input_ids"]
    return {"input_ids": ids, "labels": ids.clone()}


def saved(active, **methods):
    return gated_step(adapted(), long_batch(), active, **methods)[2] * 2**20


@pytest.mark.parametrize("seek", [None, SEEK])
@pytest.mark.parametrize("velora", [None, VELORA])
def test_saved_bytes_are_a_product(seek, velora):
    """Adapters: share of the rows x share of the layers x share of the input."""
    rows = ROWS * TOKENS if seek is None else ROWS * round(0.1 * TOKENS)
    kept = (48 if velora is None else GROUPS) + RANK
    # VeLoRA's directions, as wide as the input
    directions = 0 if velora is None else 48
    base = saved([0], seek=seek, velora=velora)
    for active in ([0, 1], [0, 2, 5], list(range(LAYERS))):
        found = saved(active, seek=seek, velora=velora) - base
        assert found == (len(active) - 1) * (rows * kept + directions) * 8


def test_all_three_in_one_run(tmp_path):
    methods = {"velora": VELORA, "ist": {"layers": 0.34, "period": 2, "score_steps": 2}, "lean": True}
    args = arguments(tmp_path, SELECTS, max_steps=6, **methods)
    own = trainer(adapted(torch.float32), args, kind=TokenSeekTrainer)
    own.train()
    keys = {"ist/lowest_layer", "seek/selected_share", "velora/saved_mib", "memory/saved_activations_mib"}
    assert all(keys <= entry.keys() for entry in logs(own)) and len(set(losses(own))) == 6
