"""Attention mass: how much attention every key receives from given query rows."""

import torch
from torch import Tensor

from ..dispatch import resolve_impl
from ..scores import block_scores, log_sum_exp, row_blocks, visible, wide
from .reference import attention_mass_reference


@torch.library.custom_op("tokenseek::attention_mass", mutates_args=())
def _mass_op(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    segments: Tensor | None,
    scale: float,
    softcap: float | None,
    window: int | None,
    sinks: Tensor | None,
) -> Tensor:
    # sums are kept in float32; autocast would round them on the way
    with torch.autocast(query.device.type, enabled=False):
        mass = torch.zeros(key.shape[0], key.shape[2], dtype=torch.float32, device=query.device)
        for block in row_blocks(query.shape[2], 8 * query.shape[0] * query.shape[1] * key.shape[2]):
            seen = visible(rows[:, block], segments, key.shape[2], window)
            scores = block_scores(query[:, :, block], key, seen, scale, softcap)
            probabilities = scores.softmax(-1)
            # a row that sees nothing gives no mass
            weights = seen.any(-1)[:, None].to(scores.dtype).expand(scores.shape[:3])
            if sinks is not None:
                weights = weights * torch.sigmoid(log_sum_exp(scores, probabilities) - wide(sinks).view(1, -1, 1))
            mass += (weights.unsqueeze(-2) @ probabilities).sum((1, 2))
    return mass


@_mass_op.register_fake
def _(query, key, rows, segments, scale, softcap, window, sinks):
    return query.new_empty(key.shape[0], key.shape[2], dtype=torch.float32)


def attention_mass(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    segments: Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """
    Column sums of softmax attention over the given query rows and all heads; no tensor of size rows x keys outlives a
    block, sums in float32, deterministic, no gradient.

    Args:
        query (`torch.Tensor` of shape `(batch, heads, rows, dim)`):
            Queries at `rows`.
        key (`torch.Tensor` of shape `(batch, kv_heads, keys, dim)`):
            All keys.
        rows (`torch.LongTensor` of shape `(batch, rows)`):
            Index of each query in its sequence; -1 marks a slot that gives no mass.
        segments, scale, softcap, window, sinks, impl:
            As in [`selected_attention`].

    Returns:
        `torch.FloatTensor` of shape `(batch, keys)`. Every query row with a visible key gives a total of `heads` (less
        what a sink takes); padding receives 0.

    Raises:
        ValueError: `impl` is unknown.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    call = attention_mass_reference if resolve_impl(impl, query) == "reference" else _mass_op
    return call(query, key, rows, segments, scale, softcap, window, sinks)
