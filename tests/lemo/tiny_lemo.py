"""Small batches for LeMo: whole, padded left and right, packed."""

import torch

from hf_tokenseek.lemo import LemoConfig
from tests.seek.tiny_families import VOCABULARY

BLOCK = 4
VELORA = {"groups": 4, "inputs": ["attention", "mlp", "down"], "projector": "random"}
# every layer of a model with two of them drops tokens
EVERYWHERE = {"block": BLOCK, "dense_first": 0, "dense_last": 0}


def lemo(**fields) -> LemoConfig:
    """A configuration for tiny models."""
    return LemoConfig(**{**EVERYWHERE, "keep": 0.5, "queries": "later", **fields})


def make_inputs(layout: str = "whole", batch: int = 2, n: int = 42, seed: int = 0) -> dict:
    """`input_ids`, `labels`, and what the layout needs; `n` is no multiple of a block."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (batch, n), generator=generator)
    labels = ids.masked_fill(torch.rand(batch, n, generator=generator) < 0.3, -100)
    if layout == "whole":
        return {"input_ids": ids, "labels": labels}
    if layout == "packed":
        # documents of uneven lengths, limits not at those of blocks
        lengths = [n // 3 + 1, n - n // 3 - 1]
        positions = torch.cat([torch.arange(length) for length in lengths]).expand(batch, -1)
        return {"input_ids": ids, "labels": labels, "position_ids": positions}
    lost = torch.arange(batch)[:, None] * 11 + 2
    index = torch.arange(n)
    mask = (index >= lost if layout == "left" else index < n - lost).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    # what padding predicts is nobody's business
    return {
        "input_ids": ids * mask,
        "labels": labels.masked_fill((mask == 0) | (positions == 0), -100),
        "attention_mask": mask,
        "position_ids": positions,
    }
