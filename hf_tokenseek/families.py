"""What is known of each model family (`config.model_type`), as data. `docs/families.md` is generated from the tests."""

from torch import nn


# Verified by tests/seek/test_families.py: scouting and ditching reproduce the plain model, gradients the reference.
SUPPORTED = (
    "llama",
)

_NO_INTERFACE = "its attention does not go through transformers' attention interface"
_NO_KEYWORDS = "it does not hand keywords down to its attention function"
_RECURRENT = "its recurrent layers carry state from token to token, which a subset of rows cannot reproduce"

REFUSED = {
    "bloom": _NO_INTERFACE,
    "codegen": _NO_INTERFACE,
    "gptj": _NO_INTERFACE,
    "mpt": _NO_INTERFACE,
    "nemotron": _NO_KEYWORDS,
    "stablelm": _NO_KEYWORDS,
    "falcon_h1": _RECURRENT,
    "jamba": _RECURRENT,
    "mamba": _RECURRENT,
    "qwen3_next": _RECURRENT,
}

# Families that count positions by the attention mask instead of by index.
POSITIONS_FROM_MASK = ("opt",)


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
        raise ValueError(f"TokenSeek does not support model_type {family!r}: {why}. Supported: {', '.join(SUPPORTED)}.")
    if not type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        raise ValueError(
            f"TokenSeek trains causal language models, got {type(model).__name__}. Use AutoModelForCausalLM, or turn "
            "TokenSeek off with seek=None."
        )
    if getattr(config, "output_router_logits", False):
        raise ValueError(
            "TokenSeek does not support the router's auxiliary loss over a subset of tokens. Set "
            "model.config.output_router_logits = False."
        )
