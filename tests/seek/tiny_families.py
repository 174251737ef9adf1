"""Tiny random models of transformers' decoder families in which everything a family can do to attention happens."""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

VOCABULARY = 200
WINDOW = 16  # shorter than the sequences of the tests, so that it hides something
# one of each kind of attention, tried in every combination
REPRESENTATIVES = ("llama", "gemma2", "gpt_oss", "qwen3_moe", "deepseek_v3", "gpt2")

# Taken by every config that knows the name.
_SMALL = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), 64),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "dff"), 128),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 256),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "moe_ffn_hidden_size"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "rotary_dim", "hidden_size_per_layer_input"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    "num_key_value_heads": 2,
    "head_dim": 16,
    "v_head_dim": 12,
    "sliding_window": WINDOW,
    "use_sliding_window": True,
    "word_embed_proj_dim": 32,
    "no_rope_layer_interval": 2,
    # far from one, and small enough that a cap bends what it caps
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "logits_scaling"), 1.5),
    "logit_scale": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# No dropout and no router noise: two passes are to be compared.
_NOISE = (
    "attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "hidden_dropout", "dropout", "layerdrop",
    "attention_probs_dropout_prob", "hidden_dropout_prob", "activation_dropout", "router_jitter_noise",
    "input_jitter_noise", "residual_dropout", "embedding_dropout",
)  # fmt: skip
# Later layers that attend to the keys and values of earlier ones, and heads of two sizes.
_GEMMA4 = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 32,
}
# What a single family needs on top.
_OWN: dict[str, dict] = {
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": None, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 2.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 32, "moe_top_k": 2},
    },
    "gemma3n_text": {
        **{name: value for name, value in _GEMMA4.items() if name != "global_head_dim"},
        "activation_sparsity_pattern": [0.95, 0.0] * 2,
        "laurel_rank": 8,
    },
    "gemma4_text": {
        **_GEMMA4,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
    },
    "gemma4_unified_text": _GEMMA4,
    "minicpm3": {"dim_model_base": 32},
    "ministral3": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "llama_4_scaling_beta": 0.5,
            "original_max_position_embeddings": 8,
        }
    },
    "phi": {"qk_layernorm": True},
}
# How many experts a token takes.
_TAKEN = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")


def tiny_config(family: str, smooth: bool = False):
    """
    A config of `family` with two tiny layers, or as many as it has kinds of layers.

    Args:
        family (`str`): the `model_type`.
        smooth (`bool`): no rounding decides about anything: a token takes all experts, no activation is cut off.
    """
    config_class = CONFIG_MAPPING[family]
    defaults = config_class()
    values = {name: value for name, value in _SMALL.items() if _settable(defaults, name)}
    values |= {name: 0.0 for name in _NOISE if isinstance(getattr(defaults, name, None), float)}
    if hasattr(defaults, "kv_lora_rank"):
        # latent attention has a key and value for every head
        values["num_key_value_heads"] = values.get("num_attention_heads", 4)
        values.pop("head_dim", None)
    if getattr(defaults, "layer_types", None) and "sliding_window" in values:
        values["layer_types"] = ["sliding_attention", "full_attention"]
    values |= _OWN.get(family, {})
    if smooth:
        values.pop("activation_sparsity_pattern", None)
        values |= {name: 4 for name in _TAKEN if name in values}
        if "ffn_config" in values:
            values["ffn_config"] = {**values["ffn_config"], "moe_top_k": 4}
    return config_class(**values)


def _settable(config, name: str) -> bool:
    found = getattr(type(config), name, None)
    if isinstance(found, property) and found.fset is None:
        return False
    return name in config.attribute_map or name in config.to_dict()


def tiny_model(family: str, dtype: torch.dtype = torch.float32, smooth: bool = False):
    """A tiny random model of `family` in training mode, always the same, no parameter exactly zero or one."""
    config = tiny_config(family, smooth)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > 5_000_000:
        raise ValueError(f"the tiny config of {family} has {size} parameters")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.02)
    return model.to(dtype).train()
