"""Which of PEFT's adapters TokenSeek trains: those whose output at a row follows from that row alone."""

from torch import nn

# Verified by tests/peft/test_methods.py: selected rows have the plain model's losses, all rows its gradients.
SUPPORTED = (
    "ADALORA", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD", "GRALORA", "HIRA", "HRA", "IA3",
    "LN_TUNING", "LOHA", "LOKR", "LORA", "MISS", "OFT", "OSF", "PEANUT", "RANDLORA", "ROAD", "SHIRA", "TINYLORA",
    "TRAINABLE_TOKENS", "UNILORA", "VBLORA", "VERA", "WAVEFT",
)  # fmt: skip

_NOT_ROW_BY_ROW = "what it adds to a token depends on other tokens"
REFUSED = {
    "ADAPTION_PROMPT": "it replaces the attention that TokenSeek selects rows of",
    "LILY": _NOT_ROW_BY_ROW,
    "POLY": "it needs `task_ids`, which TokenSeek does not hand on",
    "PVERA": "it draws random numbers, which differ from pass to pass",
    "XLORA": _NOT_ROW_BY_ROW,
}

# Options of a LoRA config under which it is another method.
REFUSED_LORA_OPTIONS = {
    "alora_invocation_tokens": "which tokens it changes depends on other tokens",
    "arrow_config": "its routing has not been verified with selected rows",
    "layer_replication": "its copies of layers do not take another attention implementation",
    "monteclora_config": "it draws random numbers, which differ from pass to pass",
}


def check_adapters(model: nn.Module, causal_lm: nn.Module) -> None:
    """
    Refuses adapters that a subset of the rows would train wrong.

    Args:
        model (`nn.Module`): the model as given, possibly a PEFT model inside parallel wrappers.
        causal_lm (`nn.Module`): the causal language model inside of it.

    Raises:
        ValueError: says which adapter, why, and which ones work.
    """
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    for config in (getattr(model, "peft_config", None) or {}).values():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if config.is_prompt_learning:
            _refuse(kind, "its virtual tokens are not among the tokens that can be selected")
        if kind not in SUPPORTED:
            _refuse(kind, REFUSED.get(kind, "it has not been verified that it treats every token by itself"))
        for option, why in REFUSED_LORA_OPTIONS.items():
            if kind == "LORA" and getattr(config, option, None):
                _refuse(f"LORA with {option}", why)
    if hasattr(causal_lm.get_output_embeddings(), "base_layer"):
        raise ValueError(
            "TokenSeek does not support an adapter on the output embeddings: their weight is read directly and the "
            "adapter would not be trained. Take them (`lm_head`) out of `target_modules`, or put them into "
            "`modules_to_save`."
        )


def _refuse(kind: str, why: str) -> None:
    raise ValueError(
        f"TokenSeek does not support the PEFT method {kind}: {why}. Supported: {', '.join(SUPPORTED)}. Use one of "
        "them, or turn TokenSeek off with seek=None."
    )
