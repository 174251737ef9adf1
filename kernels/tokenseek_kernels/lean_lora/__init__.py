"""A LoRA adapter's output that keeps one input in its own dtype, and no cast or dropped copy of it."""

from tokenseek_kernels.lean_lora.function import lora_delta, seeded_dropout

__all__ = ["lora_delta", "seeded_dropout"]
