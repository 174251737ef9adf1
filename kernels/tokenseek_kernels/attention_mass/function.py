"""Attention mass: how much attention every key receives from given query rows."""

import torch
from torch import Tensor

from ..custom_op import custom_op
from ..precision import without_autocast
from ..scores import check_attention, resolve_attention_impl
from . import blocked
from .reference import attention_mass_reference


@custom_op("tokenseek::attention_mass")
def _mass_op(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    segments: Tensor | None,
    scale: float,
    softcap: float | None,
    window: int | None,
    first_keys: Tensor | None,
    sinks: Tensor | None,
    lse: Tensor | None,
    impl: str,
) -> Tensor:
    module = blocked
    if impl == "triton":
        from . import triton as module
    with without_autocast(query.device):
        return module.attention_mass(query, key, rows, segments, scale, softcap, window, first_keys, sinks, lse)


@_mass_op.register_fake
def _(query, key, rows, segments, scale, softcap, window, first_keys, sinks, lse, impl):
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
    first_keys: Tensor | None = None,
    sinks: Tensor | None = None,
    lse: Tensor | None = None,
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
            Index of each query in its sequence, ascending; -1, anywhere, marks a slot that gives no mass.
        lse (`torch.Tensor` of shape `(batch, heads, rows)`, *optional*):
            Log-sum-exp of each query's scores, its sink counted, +inf where it sees nothing, as [`causal_attention`]
            gives it. Spares the Triton kernel the first of two passes; on the CPU nothing is gained.
        segments, scale, softcap, window, first_keys, sinks, impl:
            As in [`selected_attention`].

    Returns:
        `torch.FloatTensor` of shape `(batch, keys)`. Every query row with a visible key gives a total of `heads` (less
        what a sink takes); padding receives 0.

    Raises:
        ValueError: shapes do not fit together, or `impl` is unknown or cannot run here.
    """
    check_attention(query, key, rows, segments, window, first_keys=first_keys)
    if lse is not None and lse.shape != query.shape[:3]:
        raise ValueError(f"`lse` {tuple(lse.shape)} must be (batch, heads, rows) of query {tuple(query.shape)}.")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    impl = resolve_attention_impl(impl, query)
    if impl == "reference":
        return attention_mass_reference(query, key, rows, segments, scale, softcap, window, first_keys, sinks)
    return _mass_op(query, key, rows, segments, scale, softcap, window, first_keys, sinks, lse, impl)
