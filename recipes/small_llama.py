"""Small Llamas with random weights, to pre-train."""

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

SHAPES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
PRESETS = {
    # 8M parameters with a vocabulary of 4,096 tokens: for a CPU
    "llama-8m": (256, 688, 8, 8),
    # what GaLore, VeLoRA and APOLLO call 60M: 58M with their vocabulary of 32,000 tokens, 29M with one of 4,096
    "llama-60m": (512, 1376, 8, 8),
}


def llama_shapes(preset: str, **sizes: int | None) -> dict[str, int]:
    """A preset's shapes, each replaced by the one of the same name in `sizes` that is not `None`.

    Raises:
        `ValueError`: if the preset is unknown, a size is not positive, or the heads do not divide the hidden size into
            even widths.
    """
    if preset not in PRESETS:
        raise ValueError(f"Unknown preset {preset!r}. Choose one of {', '.join(PRESETS)}.")
    shapes = dict(zip(SHAPES, PRESETS[preset], strict=True))
    shapes |= {name: size for name, size in sizes.items() if size is not None}
    for name, size in shapes.items():
        if size < 1:
            raise ValueError(f"{name}={size} should be at least 1.")
    hidden, heads = shapes["hidden_size"], shapes["num_attention_heads"]
    # rotary embeddings turn a head's numbers in pairs
    if hidden % (2 * heads):
        allowed = [number for number in range(1, hidden // 2 + 1) if hidden % (2 * number) == 0]
        raise ValueError(
            f"num_attention_heads={heads} does not divide hidden_size={hidden} into heads of an even width. "
            + (f"Choose one of {allowed}." if allowed else "Choose an even hidden_size.")
        )
    return shapes


def random_llama(shapes: dict[str, int], tokenizer: PreTrainedTokenizerBase, positions: int) -> LlamaForCausalLM:
    """A Llama of these shapes for the tokenizer's vocabulary and sequences of up to `positions` tokens, in fp32."""
    config = LlamaConfig(
        **shapes,
        vocab_size=len(tokenizer),
        max_position_embeddings=positions,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=False,
    )
    return LlamaForCausalLM(config)
