"""What the layers of the plain model see, for whoever wants to score their blocks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..patching import evaluating, find_causal_lm, find_layers
from ..seek.attention import leave_attention, use_attention
from .blocks import Blocks, Layout
from .config import LemoConfig
from .layer import LayerCall
from .scores import Scorer


class _User:
    """Whoever is recording, as a user of the registered attention."""


@contextmanager
def recording(model: nn.Module) -> Iterator[None]:
    """Inside the block queries and keys of the model's layers can be taken down, see [`record`]."""
    model = find_causal_lm(model)
    user = _User()
    use_attention(model, user)
    try:
        yield
    finally:
        leave_attention(model, user)


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
    layout = Layout.read({**inputs, "labels": labels})
    blocks = Blocks(layout.segments, layout.targets, layout.real, config)

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
