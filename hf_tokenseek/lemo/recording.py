"""What the layers of the plain model see, for whoever wants to score their blocks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..patching import evaluating, find_causal_lm, find_layers
from ..seek.attention import register_attention
from ..seek.batch import IGNORE, count_tokens, segments_of, targets_of
from .blocks import Blocks
from .config import LemoConfig
from .layer import LayerCall
from .scores import Scorer


@contextmanager
def recording(model: nn.Module) -> Iterator[None]:
    """Inside the block queries and keys of the model's layers can be taken down, see [`record`]."""
    model = find_causal_lm(model)
    before = model.config._attn_implementation
    model.set_attn_implementation(register_attention(before))
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def record(model: nn.Module, inputs: dict, config: LemoConfig, see: Callable[[int, LayerCall, Blocks], None]) -> None:
    """
    Runs the plain model without gradient and shows each layer's call.

    Args:
        model (`nn.Module`): a causal language model, inside of [`recording`].
        inputs (`dict`): `input_ids`, and what else belongs to them; `labels` say which blocks have some.
        config ([`LemoConfig`]): the size of a block.
        see (`Callable`): called with the index of each layer, its call and the blocks.
    """
    model = find_causal_lm(model)
    _, layers = find_layers(model)
    inputs = dict(inputs)
    labels = inputs.pop("labels", None)
    tokens = inputs["input_ids"]
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    segments = segments_of(*tokens.shape, tokens.device, mask, positions)
    targets = torch.full_like(segments, IGNORE) if labels is None else targets_of(labels, segments)
    blocks = Blocks(segments, targets, count_tokens(segments, targets)[0], config)

    def show(index: int):
        def hook(layer, args, kwargs) -> None:
            see(index, LayerCall(layer, layer.forward, args, kwargs), blocks)

        return hook

    hooks = [layer.register_forward_pre_hook(show(index), with_kwargs=True) for index, layer in enumerate(layers)]
    try:
        with torch.no_grad(), evaluating(model):
            model.base_model(**inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()


def oracle_scores(model: nn.Module, inputs: dict, config: LemoConfig) -> tuple[list[Tensor], Blocks]:
    """The paper's scores of every layer of the plain model, each `(batch, blocks)`, and the blocks."""
    scorer, found = Scorer(config, (0, 0)), []
    blocks_seen = []

    def see(index: int, call: LayerCall, blocks: Blocks) -> None:
        found.append(scorer.oracle(index, call, blocks))
        blocks_seen.append(blocks)

    record(model, inputs, config, see)
    return found, blocks_seen[0]
