"""QLoRA with the real library: a base in NF4 or int8, adapters in float32, TokenSeek on top."""

import pytest
import torch
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from hf_tokenseek import attach
from hf_tokenseek.memory import SavedActivations
from tests.peft.tiny_peft import RATIO_ONE, SELECTS, adapted, gradients, largest_error, lora, micro_batch
from tests.tiny_training import EVERYTHING, arguments, losses, trainer

pytest.importorskip("bitsandbytes")
from peft import prepare_model_for_kbit_training  # noqa: E402

NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": torch.float32,
}
QUANTISED = {"nf4": NF4, "int8": {"load_in_8bit": True}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved Llama of three layers, wide enough for blocks of 64."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    path = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(params=QUANTISED)
def build(folder, request):
    """Loads the quantised base and puts an adapter on it."""

    def build(checkpointing: bool = False, **options):
        config = BitsAndBytesConfig(**QUANTISED[request.param])
        base = LlamaForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=checkpointing)
        return adapted(base, lora(**options))

    return build


@pytest.mark.parametrize("checkpointing", [False, True])
def test_everything_selected_is_plain_training(build, checkpointing):
    model = build(checkpointing)
    loss = model(**micro_batch()).loss
    truth = gradients(model, loss)
    for seek in (RATIO_ONE, SELECTS):
        with attach(model, seek=seek) as handle:
            found = model(**micro_batch()).loss
            grads = gradients(model, found)
        torch.testing.assert_close(found, loss, rtol=2e-5, atol=0)
        assert all(g.any() for g in grads.values())
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        if seek is RATIO_ONE:
            assert largest_error(grads, truth) <= 2e-5
        else:
            assert handle.selection.shape[1] < 12
    # neither has changed what the quantised layers compute, or that they have a backward
    assert largest_error(gradients(model, model(**micro_batch()).loss), truth) <= 2e-5


def test_quantised_weights_cost_no_saved_bytes(build):
    """As much as the same model in float32, whose frozen weights cost nothing."""
    options = {"target_modules": ["q_proj", "v_proj"]}
    model = build(**options)
    plain = adapted(LlamaForCausalLM._from_config(model.get_base_model().config, dtype=torch.float32), lora(**options))
    assert type(plain.get_base_model().model.layers[0].mlp.up_proj) is torch.nn.Linear
    counts = []
    for candidate in (model, plain):
        candidate.get_base_model().get_input_embeddings().requires_grad_(False)
        with attach(candidate, seek=SELECTS), SavedActivations(candidate) as counted:
            loss = candidate(**micro_batch()).loss
            counts.append(counted.bytes)
        del loss
    assert counts[0] == counts[1]


def test_training_run(build, tmp_path):
    runs = []
    for seek in (None, EVERYTHING, {"context": 0.2, "plain_fallback": False}):
        own = trainer(build(), arguments(tmp_path, seek, optim="sgd", learning_rate=0.3))
        own.train()
        runs.append(losses(own))
    plain, everything, selected = runs
    assert everything == pytest.approx(plain, rel=1e-4)
    assert selected[0] == pytest.approx(plain[0], rel=1e-4) and selected != pytest.approx(plain, rel=1e-4)
