"""Tiny models with every adapter of PEFT that TokenSeek trains, and what is compared about them."""

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model

CAUSAL = {"task_type": "CAUSAL_LM"}
LAYERS = ["q_proj", "v_proj", "down_proj"]
SQUARE = ["q_proj", "o_proj"]
SELECTS = {"context": 0.1, "plain_fallback": False}
RATIO_ONE = {"ratio": 1.0, "plain_fallback": False}
LENGTH, ANSWER = 30, 6


def lora(**options) -> LoraConfig:
    """LoRA that adds something from the first step on."""
    return LoraConfig(**{**CAUSAL, "target_modules": LAYERS, "r": 4, "init_lora_weights": False, **options})


def velora(**options) -> LoraConfig:
    """LoRA with VeLoRA's backward."""
    if not hasattr(peft, "VeloraConfig"):
        pytest.skip("this PEFT has no VeLoRA")
    return lora(velora_config=peft.VeloraConfig(num_groups=4, **options))


LORA_VARIANTS = {
    "lora": lora,
    "dora": lambda: lora(use_dora=True),
    "rslora": lambda: lora(use_rslora=True),
    "lora-everywhere": lambda: lora(target_modules="all-linear"),
    "lora-embeddings": lambda: lora(target_modules=["embed_tokens", "q_proj"]),
    "lora-head-saved": lambda: lora(modules_to_save=["lm_head", "embed_tokens"]),
    "lora-norms-saved": lambda: lora(modules_to_save=["input_layernorm"]),
    "lora-new-tokens": lambda: lora(trainable_token_indices=[3, 5, 7]),
    "lora-biases": lambda: lora(lora_bias=True),
    "velora": velora,
    "velora-once": lambda: velora(init_type="batch_average_once"),
    "velora-random": lambda: velora(init_type="random"),
}
# By PEFT's name of the method: class of the config, and its fields.
METHODS = {
    "ADALORA": ("AdaLoraConfig", {"total_step": 10, "init_r": 4, "target_r": 2}),
    "BEFT": ("BeftConfig", {}),
    "BOFT": ("BOFTConfig", {"boft_block_size": 4, "init_weights": False}),
    "C3A": ("C3AConfig", {"block_size": 16, "init_weights": False}),
    "DEFT": ("DeftConfig", {}),
    "DELORA": ("DeloraConfig", {"r": 4, "init_weights": False}),
    "FOURIERFT": ("FourierFTConfig", {"n_frequency": 20, "init_weights": False}),
    "FROD": ("FrodConfig", {}),
    "GRALORA": ("GraloraConfig", {"r": 8, "init_weights": False}),
    "HIRA": ("HiraConfig", {"r": 4, "init_weights": False}),
    "HRA": ("HRAConfig", {"r": 4, "init_weights": False}),
    "IA3": ("IA3Config", {"feedforward_modules": ["down_proj"], "init_ia3_weights": False}),
    "LN_TUNING": ("LNTuningConfig", {"target_modules": ["input_layernorm"]}),
    "LOHA": ("LoHaConfig", {"r": 4, "init_weights": False}),
    "LOKR": ("LoKrConfig", {"r": 4, "init_weights": False}),
    "MISS": ("MissConfig", {"r": 4, "init_weights": False}),
    "OFT": ("OFTConfig", {"r": 0, "oft_block_size": 4, "init_weights": False}),
    "OSF": ("OSFConfig", {}),
    "PEANUT": ("PeanutConfig", {}),
    "RANDLORA": ("RandLoraConfig", {"r": 4, "init_weights": False, "target_modules": SQUARE}),
    "ROAD": ("RoadConfig", {"group_size": 16, "init_weights": False}),
    "SHIRA": ("ShiraConfig", {"r": 4}),
    "TINYLORA": ("TinyLoraConfig", {}),
    "TRAINABLE_TOKENS": ("TrainableTokensConfig", {"target_modules": ["embed_tokens"], "token_indices": [1, 5, 7]}),
    "UNILORA": ("UniLoraConfig", {}),
    "VBLORA": ("VBLoRAConfig", {"r": 4, "num_vectors": 16, "vector_length": 16}),
    "VERA": ("VeraConfig", {"r": 4, "init_weights": False, "target_modules": SQUARE}),
    "WAVEFT": ("WaveFTConfig", {"n_frequency": 20, "init_weights": False}),
}


def adapted(model, config):
    """`model` with an adapter that is not zero, in training mode."""
    torch.manual_seed(1)
    model = get_peft_model(model, config).train()
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def micro_batch(batch: int = 2, length: int = LENGTH) -> dict[str, torch.Tensor]:
    """Random sequences without padding, of which the last [`ANSWER`] tokens are labels."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(8, 128, (batch, length), generator=generator)
    # tokens with trained embeddings: some that every selection keeps, some that few do
    ids[:, [2, 3, 9, -3, -2]] = torch.tensor([5, 7, 5, 5, 7])
    return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(length) < length - ANSWER, -100)}


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of all trainable parameters, by name; zero where there is none."""
    model.zero_grad()
    loss.backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def largest_error(found: dict, truth: dict) -> float:
    """Largest difference relative to the largest gradient."""
    scale = max(g.abs().max() for g in truth.values())
    return float(max((found[name] - g).abs().max() for name, g in truth.items()) / scale)
