"""Tiny random configs of transformers' decoder families, for tests and for generating docs/families.md."""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM


VOCABULARY = 200
_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "n_inner": 128,
    "d_model": 64,
    "ffn_dim": 128,
    "word_embed_proj_dim": 64,
    "n_heads": 4,
    "n_layers": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "sliding_window": 16,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "rotary_dim": 16,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 128,
    "attention_heads": 4,
    "num_layers": 2,
    "num_heads": 4,
    "ffn_hidden_size": 128,
    "shared_expert_intermediate_size": 32,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCABULARY,
}
_DROPOUTS = (
    "attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "hidden_dropout", "dropout", "attention_probs_dropout_prob",
    "hidden_dropout_prob", "activation_dropout", "layerdrop", "router_jitter_noise", "residual_dropout", "embedding_dropout",
)  # fmt: skip


def tiny_config(family: str, layers: int = 2):
    """A config of `family` with `layers` tiny layers, no dropout and no router noise."""
    config_class = CONFIG_MAPPING[family]
    defaults = config_class()
    values = {k: v for k, v in _SMALL.items() if hasattr(defaults, k)}
    values.update({k: 0.0 for k in _DROPOUTS if isinstance(getattr(defaults, k, None), float)})
    for name in ("num_hidden_layers", "n_layer", "n_layers", "decoder_layers", "num_layers"):
        if name in values:
            values[name] = layers
    for drop in ((), ("head_dim",), ("head_dim", "num_key_value_heads"), ("sliding_window",)):
        try:
            return config_class(**{k: v for k, v in values.items() if k not in drop})
        except Exception as error:  # a config says in its own way which sizes it cannot combine
            last = error
    raise last


def tiny_model(family: str, layers: int = 2, dtype: torch.dtype = torch.float32):
    """A tiny random model of `family` in training mode, seeded, with norm weights away from one."""
    config = tiny_config(family, layers)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > 5_000_000:
        raise ValueError(f"the tiny config of {family} has {size} parameters")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape).to(dtype) * 0.02)
    return model.train()
