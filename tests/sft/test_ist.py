"""Sparse tuning in trl's trainers: in every layout of the batch, beside their fused head, with selection."""

import pytest
import torch
from peft import LoraConfig
from trl import SFTTrainer

from hf_tokenseek import IstCallback, SeekCallback
from tests.sft.test_velora import LAYOUTS, parameters_equal
from tests.sft.tiny_sft import SELECTS, arguments, logged, prompt_completion, run, texts

SPARSE = {"layers": 0.34, "period": 1, "score_steps": 1}
ADAPTERS = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}


@pytest.mark.filterwarnings("ignore")  # trl warns of packing without flash attention
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_layers_train_plainly_and_some_do_not(tiny_llama, tmp_path, layout):
    data = texts() if layout == "packed" else prompt_completion()
    plain = run(tiny_llama(), arguments(tmp_path, **LAYOUTS[layout]), data, SFTTrainer)
    whole = run(tiny_llama(), arguments(tmp_path, None, ist={"layers": 1.0}, **LAYOUTS[layout]), data)
    few = run(tiny_llama(), arguments(tmp_path, None, ist=SPARSE, **LAYOUTS[layout]), data)
    assert logged(whole, "loss") == logged(plain, "loss") and parameters_equal(whole.model, plain.model)
    assert logged(few, "loss")[0][0] == logged(plain, "loss")[0][0] and not parameters_equal(few.model, plain.model)


@pytest.mark.parametrize("seek", [None, SELECTS], ids=["plain", "seek"])
def test_callback_in_the_stock_trainer_is_the_same_training_and_learns(tiny_llama, tmp_path, seek, capsys):
    torch.manual_seed(0)
    own = run(tiny_llama(), arguments(tmp_path, seek, ist=SPARSE), peft_config=LoraConfig(**ADAPTERS))
    said = capsys.readouterr().out
    assert "importance " in said and "0: +0.00" not in said
    torch.manual_seed(0)
    callbacks = [*([] if seek is None else [SeekCallback(seek)]), IstCallback(SPARSE)]
    stock = run(
        tiny_llama(), arguments(tmp_path), kind=SFTTrainer, callbacks=callbacks, peft_config=LoraConfig(**ADAPTERS)
    )
    keys = ("loss", "ist/lowest_layer", "mean_token_accuracy")
    assert logged(own, *keys) == logged(stock, *keys) and parameters_equal(own.model, stock.model)
