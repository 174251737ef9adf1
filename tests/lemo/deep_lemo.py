"""A deeper Llama for LeMo, its batches, and a step that tells which rows were kept."""

import torch
from transformers import MistralConfig, MistralForCausalLM

from hf_tokenseek import attach
from tests.ist.tiny_ist import SIZES, deep_llama, step
from tests.lemo.naive import kept_tokens
from tests.lemo.tiny_lemo import lemo, make_inputs

LAYERS, WORDS, WINDOW = 4, 128, 9
# every block is among those that are always kept: all tokens go through the gathering and scattering of rows
ALL_KEPT = {"keep": 0.5, "sinks": 99}


def llama(dtype=torch.float64, layers=LAYERS):
    """Always the same, in training mode."""
    return deep_llama(dtype, layers)


def windowed(dtype=torch.float64):
    """The same, with windows in all layers that hide kept tokens from each other."""
    torch.manual_seed(0)
    config = MistralConfig(**SIZES, num_hidden_layers=LAYERS, head_dim=8, sliding_window=WINDOW)
    return MistralForCausalLM(config).to(dtype).train()


def batch(layout: str = "whole", **sizes) -> dict:
    """[`make_inputs`] of the model's vocabulary."""
    inputs = make_inputs(layout, **sizes)
    return {**inputs, "input_ids": inputs["input_ids"] % WORDS, "labels": inputs["labels"].clamp(max=WORDS - 1)}


def lemo_step(model, inputs: dict, methods: dict | None = None, **fields):
    """Loss, gradients and saved MiB of one step with LeMo, and the rows that each layer kept."""
    with attach(model, lemo=lemo(**fields), **(methods or {})) as handle:
        found = step(model, inputs)
        return *found, kept_rows(handle)


def kept_rows(handle) -> dict[int, torch.Tensor]:
    """The rows that each layer kept in the last forward pass."""
    return {layer: kept.rows for layer, kept in handle.lemo.elimination.kept.items()}


def computed_tokens(rows: dict[int, torch.Tensor], n: int) -> torch.Tensor:
    """`(batch, n)`: tokens that all layers kept."""
    return torch.stack([kept_tokens(kept, n) for kept in rows.values()]).all(0)


def assert_same_gradients(found: dict, expected: dict) -> None:
    """Bit for bit."""
    assert found.keys() == expected.keys() and found
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def assert_close_gradients(found: dict, expected: dict, tolerance: float) -> None:
    """Relative to the largest entry of each gradient."""
    assert found.keys() == expected.keys() and found
    for name, gradient in expected.items():
        atol = tolerance * gradient.abs().max().item()
        torch.testing.assert_close(
            found[name], gradient, rtol=0, atol=atol, msg=lambda said, name=name: f"{name} {said}"
        )
