"""The estimator's QLoRA: as transformers loads it, and as much as its paper says."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, LlamaConfig, TrainingArguments

from hf_tokenseek.memory import MemoryTracker, Training, estimate
from hf_tokenseek.memory.four_bit import in_4bit, is_4bit, scales_of, weights_of
from hf_tokenseek.memory.run import config_of, training_of

pytest.importorskip("bitsandbytes")
from peft import LoraConfig, get_peft_model  # noqa: E402

CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=128,
        hidden_size=192,
        intermediate_size=320,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        use_cache=False,
    ),
    # its layers hold transposed weights
    "gpt2": GPT2Config(vocab_size=128, n_embd=128, n_layer=2, n_head=4, n_positions=64, use_cache=False),
}
TRAINING = Training(seq=48, lora=4, load_in_4bit=True, device="cpu")


@pytest.fixture(params=CONFIGS)
def loaded(request, tmp_path):
    """A config, the path of its model, and that model in NF4 as a user loads it."""
    config = CONFIGS[request.param]
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=nf4, dtype=torch.bfloat16)
    return config, tmp_path, model


def test_weights_and_outputs_are_those_that_transformers_loads(loaded):
    _, folder, model = loaded
    mine = in_4bit(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16))
    ids = torch.arange(1, 33).view(1, -1)
    for one in (mine, model):
        one.train()
        for module in one.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    assert torch.equal(mine(ids).logits, model(ids).logits)
    quantised = dict(model.named_parameters())
    for name, parameter in mine.named_parameters():
        assert is_4bit(parameter) == is_4bit(quantised[name])
        assert torch.equal(parameter, quantised[name])
        sizes = [tensor.shape for tensor in scales_of(parameter)]
        assert sizes == [tensor.shape for tensor in scales_of(quantised[name])]


def test_the_estimate_counts_what_a_loaded_model_holds(loaded):
    config, _, model = loaded
    count = sum(weights_of(p) for p in model.parameters())
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    found = estimate(config, TRAINING)
    with MemoryTracker(adapted) as tracker:
        assert found.phases["forward"].kinds["parameters"] == tracker.now.kinds["parameters"]
    assert found.parameters - found.trained == count == sum(p.numel() for p in _plain(config).parameters())


def test_a_trainers_run_is_described_by_it(loaded, tmp_path):
    config, _, model = loaded
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    found = training_of(adapted, args, 1, 48)
    assert (found.load_in_4bit, found.lora, found.dtype) == (True, 4, "bf16")
    whole = estimate(config_of(adapted), found)
    assert whole.peak.bytes == estimate(config, TRAINING).peak.bytes
    # trl casts the adapters of quantised models
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    cast = estimate(config_of(adapted), training_of(adapted, args, 1, 48))
    with MemoryTracker(adapted) as tracker:
        assert cast.phases["forward"].kinds["parameters"] == tracker.now.kinds["parameters"]
    assert cast.phases["forward"].kinds["parameters"] < whole.phases["forward"].kinds["parameters"]
    adapted.get_base_model().is_loaded_in_8bit = True
    with pytest.raises(ValueError, match="8-bit"):
        training_of(adapted, args, 1, 48)


def test_four_bits_and_an_eighth():
    """Dettmers et al. 2023, section 3: 8 / 64 + 32 / (64 * 256) = 0.127 bits of scales a weight."""
    config = LlamaConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=2, vocab_size=64, use_cache=False)
    with torch.device("meta"):
        plain = _plain(config)
    linear = sum(p.numel() for name, p in plain.named_parameters() if "proj" in name)
    held = estimate(config, TRAINING).phases["forward"].kinds["parameters"]
    whole = estimate(config, Training(seq=48, lora=4, device="cpu")).phases["forward"].kinds["parameters"]
    # the rest is the same: adapters, norms, embeddings, head
    assert (whole - held) / linear == pytest.approx(2 - (4 + 8 / 64 + 32 / (64 * 256)) / 8, rel=2e-3)


def _plain(config):
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
