"""VeLoRA in trl's trainers: in every layout of the batch, beside their fused head, with selection and adapters."""

import pytest
import torch
from peft import LoraConfig
from trl import SFTTrainer

from hf_tokenseek import SeekCallback, VeloraCallback
from tests.sft.tiny_sft import SELECTS, arguments, logged, prompt_completion, run, texts

FEW, ALL = {"groups": 4}, {"groups": 80}
LAYOUTS = {
    "padded": {},
    "packed": {"packing": True, "max_length": 64},
    "padding-free": {"padding_free": True, "max_length": None},
}


def parameters_equal(one, other) -> bool:
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore")  # trl warns of packing without flash attention
@pytest.mark.parametrize("layout", LAYOUTS)
def test_as_many_groups_as_features_train_plainly(tiny_llama, tmp_path, layout):
    data = texts() if layout == "packed" else prompt_completion()
    plain = run(tiny_llama(), arguments(tmp_path, **LAYOUTS[layout]), data, SFTTrainer)
    own = run(tiny_llama(), arguments(tmp_path, None, velora=ALL, **LAYOUTS[layout]), data)
    few = run(tiny_llama(), arguments(tmp_path, None, velora=FEW, **LAYOUTS[layout]), data)
    assert logged(own, "loss")[0] == pytest.approx(logged(plain, "loss")[0], rel=1e-6)
    for p, q in zip(own.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert logged(few, "loss")[0][0] == logged(plain, "loss")[0][0]
    assert logged(few, "loss")[0][1:] != logged(plain, "loss")[0][1:]
    assert all(saved > 0 for saved in logged(few, "velora/saved_mib")[0])


@pytest.mark.parametrize("first", [True, False], ids=["velora first", "seek first"])
@pytest.mark.parametrize("seek", [None, SELECTS], ids=["plain", "seek"])
def test_callback_in_the_stock_trainer_is_the_same_training(tiny_llama, tmp_path, seek, first):
    own = run(tiny_llama(), arguments(tmp_path, seek, velora=FEW))
    callbacks = [VeloraCallback(FEW), *([] if seek is None else [SeekCallback(seek)])]
    callbacks = callbacks if first else callbacks[::-1]
    stock = run(tiny_llama(), arguments(tmp_path), kind=SFTTrainer, callbacks=callbacks)
    keys = ("loss", "velora/saved_mib", "mean_token_accuracy")
    assert logged(own, *keys) == logged(stock, *keys) and parameters_equal(own.model, stock.model)


def test_adapters_with_a_compressed_state(tiny_llama, tmp_path):
    """The optimizer on compressed gradients of the adapters' A is AdamW on the dense ones."""
    torch.manual_seed(0)
    runs = []
    for compressed in (False, True):
        args = arguments(
            tmp_path, None, velora={**FEW, "compressed_state": compressed}, optim="adamw_torch", learning_rate=1e-2
        )
        runs.append(run(tiny_llama(), args, peft_config=LoraConfig(r=4, target_modules="all-linear")))
    assert logged(runs[1], "loss")[0] == pytest.approx(logged(runs[0], "loss")[0], rel=1e-5)
    trained = [p for p in runs[1].model.parameters() if p.requires_grad]
    held = sum(state["exp_avg"].numel() for state in runs[1].optimizer.state.values())
    assert held < sum(p.numel() for p in trained)
