"""What is known of each model family (`config.model_type`), as data. `docs/families.md` is generated from it."""

from torch import nn

# Verified by tests/seek/test_families.py: scouting and ditching reproduce the plain model, gradients the reference.
SUPPORTED = (
    "afmoe", "apertus", "arcee", "aria_text", "axk1", "beam", "biogpt", "bitnet", "cohere", "cohere2", "cohere2_moe",
    "cohere_compass_text", "ctrl", "cwm", "dbrx", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5", "ernie4_5_moe",
    "exaone4", "exaone_moe", "flex_olmo", "flint", "gemma", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text",
    "gemma4_unified_text", "glm", "glm4", "glm4_moe", "glm4_moe_lite", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss",
    "granite", "granite_swa", "granitemoe", "granitemoe_swa", "granitemoeshared", "helium", "hunyuan_v1_dense",
    "hunyuan_v1_moe", "hy_v3", "hyperclovax", "internlm3", "iquestcoder", "jais2", "jetmoe", "kolibri1", "laguna",
    "llama", "mellum", "mimo_v2_flash", "minicpm3", "minimax_m2", "ministral", "ministral3", "mistral", "mixtral",
    "modernbert-decoder", "nanochat", "olmo", "olmo2", "olmo3", "olmoe", "opt", "persimmon", "phi", "phi3", "phimoe",
    "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "solar_open", "starcoder2", "vaultgemma",
    "youtu",
)  # fmt: skip

_REASONS = {
    "its attention does not go through transformers' attention interface": (
        "bloom", "codegen", "cpmant", "falcon", "gpt_neo", "gpt_neox_japanese", "gptj", "mpt", "openai-gpt",
        "reformer", "xglm", "xlm", "xlnet",
    ),
    "it does not hand keywords down to its attention function": ("nemotron", "stablelm"),
    "its recurrent or convolutional layers carry state from token to token, which a subset of rows cannot reproduce": (
        "bailing_hybrid", "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "kimi_linear", "lfm2",
        "lfm2_moe", "lfm3", "mamba", "mamba2", "minimax", "nemotron_h", "olmo_hybrid", "qwen3_5", "qwen3_5_moe",
        "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "qwen4_exp", "qwen4_exp_text", "recurrent_gemma", "rwkv",
        "xlstm", "zamba", "zamba2", "zaya",
    ),
    "it chooses by itself which keys a query sees, so that who sees whom does not follow from positions": (
        "axk2", "deepseek_v32", "deepseek_v4", "doge", "dots3_note_text", "glm_moe_dsa", "hy_v4", "minimax_m3_vl_text",
    ),
    "its attention is cut into chunks, which the rule on positions does not know": ("llama4_text",),
    "it adds a learned position bias to attention": ("inkling2_text", "inkling_text"),
    "its layers call attention more than once": ("diffllama", "hrm_text", "longcat_flash"),
    "its layers run over patches of bytes, not over the tokens that have labels": ("blt",),
    "it is an encoder, or an encoder used as a decoder": (
        "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert",
        "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod",
    ),
    "it is the decoder of an encoder-decoder or speech model": (
        "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "moshi", "musicgen",
        "musicgen_melody", "mvp", "pegasus", "plbart", "prophetnet", "trocr", "whisper",
    ),
    "it takes images or sound beside tokens. Load its text model if it has one": (
        "dots3_note", "emu3", "fuyu", "gemma3", "gemma3n", "gemma4", "gemma4_unified", "git", "got_ocr2", "llama4",
        "mllama", "moss_transcribe_diarize", "phi4_multimodal",
    ),
}  # fmt: skip

# Why a family is refused, by family.
REFUSED = {family: reason for reason, families in _REASONS.items() for family in families}

# Options of a config under which a supported family is another model, and why; values that are harmless all the same.
REFUSED_OPTIONS = {
    "output_router_logits": ("the router's auxiliary loss would see a subset of the tokens", ()),
    # "vision": causal as long as there are only tokens
    "use_bidirectional_attention": ("attention is not causal", ("vision",)),
    "add_cross_attention": ("cross-attention is not selected", ()),
}

# Families that count positions by the attention mask instead of by index.
POSITIONS_FROM_MASK = ("opt",)

# Families that do not read document limits off `position_ids`: under eager and sdpa attention the plain model mixes
# packed documents. TokenSeek keeps them apart, as flash attention does.
MIXES_PACKED = ("afmoe", "biogpt", "gpt_oss", "opt")

# Families whose window stands in the config and in the mask, but not in the call of the attention function.
WINDOW_FROM_CONFIG = ("phimoe",)

# Families that multiply the logits by `logits_scaling`; the others divide.
LOGITS_MULTIPLIED = ("hyperclovax",)

# Families whose attention and MLP read one and the same tensor.
SHARED_BLOCK_INPUT = ("cohere", "cohere2", "cohere2_moe", "cohere_compass_text", "phi")

# Families with a further module between the backbone and the output embeddings.
BEFORE_HEAD = {"modernbert-decoder": "lm_head"}


def check_family(model: nn.Module) -> None:
    """
    Refuses a model whose family is not known to train right.

    Raises:
        ValueError: says why, and which families work.
    """
    config = getattr(model, "config", None)
    family = getattr(config, "model_type", None)
    if family is None or not hasattr(model, "get_output_embeddings"):
        raise ValueError(f"TokenSeek needs a transformers causal language model, got {type(model).__name__}.")
    if family not in SUPPORTED:
        why = REFUSED.get(family, "it has not been verified against the plain model")
        raise ValueError(
            f"TokenSeek does not support model_type {family!r}: {why}. Supported: {', '.join(SUPPORTED)}."
        )
    if not type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        raise ValueError(
            f"TokenSeek trains causal language models, got {type(model).__name__}. Use AutoModelForCausalLM, or turn "
            "TokenSeek off with seek=None."
        )
    for option, (why, harmless) in REFUSED_OPTIONS.items():
        value = getattr(config, option, None)
        if value and value not in harmless:
            raise ValueError(
                f"TokenSeek does not support {option}={value!r}: {why}. Set model.config.{option} = False, or turn "
                "TokenSeek off with seek=None."
            )
