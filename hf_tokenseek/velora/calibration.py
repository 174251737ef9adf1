"""The mean of every compressed input over a batch's real tokens, of all ranks, without dropout."""

import inspect
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..forwarding import decoder_inputs, named_inputs
from ..patching import evaluating
from ..processes import has_peers
from .inputs import Input


def mean_inputs(model: nn.Module, units: Iterable[Input], signature: inspect.Signature, args: tuple, kwargs: dict):
    """
    Runs the decoder once without gradient.

    Args:
        model (`transformers.PreTrainedModel`): the causal language model.
        units (`Iterable[Input]`): whose means are wanted.
        signature (`inspect.Signature`): of the model's forward.
        args (`tuple`), kwargs (`dict`): what that forward was called with.

    Returns:
        `dict[str, torch.Tensor]`: the mean row, float32 at least, by [`Input`]'s `key`.

    Raises:
        ValueError: the rows of an input are not the batch's tokens.
    """
    inputs = decoder_inputs(named_inputs(signature, args, kwargs))
    tokens = inputs["input_ids"] if "input_ids" in inputs else inputs["inputs_embeds"][..., 0]
    real = inputs.get("attention_mask")
    real = real.bool() if isinstance(real, Tensor) and real.shape == tokens.shape else torch.ones_like(tokens) > 0
    sums: dict[str, Tensor] = {}
    hooks = [_hook_on(unit, real.flatten(), sums) for unit in units]
    try:
        with torch.no_grad(), evaluating(model):
            model.base_model(**inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return _means(sums, real.sum())


def _hook_on(unit: Input, real: Tensor, sums: dict[str, Tensor]):
    """A hook on the unit's first reader that adds up what it reads."""
    path, reader = next(iter(unit.readers.items()))

    def add_up(module: nn.Module, args: tuple) -> None:
        rows = args[0].flatten(0, -2)
        if len(rows) != len(real):
            raise ValueError(
                f"VeLoRA cannot tell which rows of the input of {unit.path}.{path} are padding: it has {len(rows)} "
                f"rows, the batch {len(real)} tokens. Leave {unit.name!r} out of `inputs`."
            )
        dtype = torch.promote_types(rows.dtype, torch.float32)
        sums[unit.key] = torch.where(real[:, None], rows, 0).to(dtype).sum(0)

    return reader.register_forward_pre_hook(add_up)


def _means(sums: dict[str, Tensor], count: Tensor) -> dict[str, Tensor]:
    """Over all ranks, in one message."""
    flat = torch.cat([count.view(1), *sums.values()])
    if has_peers():
        dist.all_reduce(flat)
    means = (flat[1:] / flat[0].clamp(min=1)).split([len(row) for row in sums.values()])
    return dict(zip(sums, means, strict=True))
