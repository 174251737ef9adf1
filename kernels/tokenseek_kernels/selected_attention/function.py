"""Attention of selected rows: the door, its autograd function and the custom ops behind it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..custom_op import custom_op
from ..precision import without_autocast
from ..scores import check_attention, resolve_attention_impl, row_blocks, wide_dtype
from . import blocked
from .reference import selected_attention_reference


def _module_of(impl: str):
    """The module with the two functions of an implementation; Triton is imported when it is asked for."""
    if impl == "triton":
        from . import triton

        return triton
    return blocked


@custom_op("tokenseek::selected_attention_forward")
def _forward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor,
    segments: Tensor | None,
    scale: float,
    softcap: float | None,
    window: int | None,
    first_keys: Tensor | None,
    sinks: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    with without_autocast(query.device):
        forward = _module_of(impl).selected_attention_forward
        return forward(query, key, value, rows, segments, scale, softcap, window, first_keys, sinks)


@_forward_op.register_fake
def _(query, key, value, rows, segments, scale, softcap, window, first_keys, sinks, impl):
    batch, heads, n_rows, _ = query.shape
    output = query.new_empty(batch, n_rows, heads, value.shape[-1])
    return output, query.new_empty(batch, heads, n_rows, dtype=wide_dtype(query))


@custom_op("tokenseek::selected_attention_backward")
def _backward_op(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    rows: Tensor,
    segments: Tensor | None,
    scale: float,
    softcap: float | None,
    window: int | None,
    first_keys: Tensor | None,
    sinks: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with without_autocast(query.device):
        backward = _module_of(impl).selected_attention_backward
        return backward(
            grad, query, key, value, output, lse, rows, segments, scale, softcap, window, first_keys, sinks
        )


@_backward_op.register_fake
def _(grad, query, key, value, output, lse, rows, segments, scale, softcap, window, first_keys, sinks, impl):
    batch, heads, n_rows, dim = query.shape
    return (
        query.new_empty(batch, n_rows, heads, dim).transpose(1, 2),
        key.new_empty(batch, key.shape[1], n_rows, dim),
        value.new_empty(batch, value.shape[1], n_rows, value.shape[-1]),
        lse.new_empty(0 if sinks is None else heads),
    )


@custom_op("tokenseek::overlay_", mutates_args=("states",))
def _overlay_op(states: Tensor, fresh: Tensor, rows: Tensor, impl: str) -> None:
    _module_of(impl).overlay_(states, fresh, rows)


@_overlay_op.register_fake
def _(states, fresh, rows, impl):
    return None


def overlay_(states: Tensor, fresh: Tensor, rows: Tensor, impl: str) -> None:
    """Writes the fresh rows of selected keys or values over the scouted ones, in place; empty slots (-1) have none."""
    # layers may share their keys and values: writing the same rows again changes nothing, so their version stays
    _overlay_op(states.data, fresh, rows, impl)


class _SelectedAttention(torch.autograd.Function):
    """Saves query, output, log-sum-exp and *references* to scouted keys and values; nothing of size rows x keys."""

    @staticmethod
    def forward(
        ctx, query, fresh_key, fresh_value, key, value, rows, segments, scale, softcap, window, first_keys, sinks, impl
    ):
        overlay_(key, fresh_key, rows, impl)
        overlay_(value, fresh_value, rows, impl)
        output, lse = _forward_op(query, key, value, rows, segments, scale, softcap, window, first_keys, sinks, impl)
        ctx.save_for_backward(query, key, value, output, lse, rows, segments, first_keys, sinks)
        ctx.plain, ctx.impl = (scale, softcap, window), impl
        return output

    @staticmethod
    def backward(ctx, grad):
        query, key, value, output, lse, rows, segments, first_keys, sinks = ctx.saved_tensors
        scale, softcap, window = ctx.plain
        d_query, d_key, d_value, d_sinks = _backward_op(
            grad, query, key, value, output, lse, rows, segments, scale, softcap, window, first_keys, sinks, ctx.impl
        )
        d_sinks = None if sinks is None else d_sinks.to(sinks.dtype)
        return d_query, d_key, d_value, None, None, None, None, None, None, None, None, d_sinks, None


def selected_attention(
    query: Tensor,
    fresh_key: Tensor,
    fresh_value: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor,
    segments: Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    first_keys: Tensor | None = None,
    sinks: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """
    Attention of the selected rows of each sequence over all of its keys, by position.

    Saved for the backward pass, in bytes (`e` = bytes an element): `batch * rows * heads * (dim + value_dim) * e` for
    query and output, `batch * heads * rows * 4` for the log-sum-exp, `rows` and `segments` (shared by all layers), and
    references to `key` and `value`, which exist anyway. Gradient reaches `query`, `sinks` and the *fresh* rows only.

    Args:
        query (`torch.Tensor` of shape `(batch, heads, rows, dim)`):
            Queries of the selected rows.
        fresh_key, fresh_value (`torch.Tensor` of shape `(batch, kv_heads, rows, dim)`, `(..., value_dim)`):
            Keys and values of the selected rows, with gradient. They are written over their places in `key`, `value`.
        key, value (`torch.Tensor` of shape `(batch, kv_heads, keys, dim)`, `(..., value_dim)`):
            Scouted keys and values of all tokens, without gradient. **Modified in place.**
        rows (`torch.LongTensor` of shape `(batch, rows)`):
            Index of each selected row, ascending; -1 fills up at the end.
        segments (`torch.LongTensor` of shape `(batch, keys)`, *optional*):
            Document number of every token, -1 for padding; `None` means one document without padding on the left.
        scale (`float`, *optional*, defaults to `dim ** -0.5`):
            Factor on the scores.
        softcap (`float`, *optional*):
            Gemma 2's `softcap * tanh(score / softcap)`.
        window (`int`, *optional*):
            Sliding window in tokens, the query's own included.
        first_keys (`torch.LongTensor` of shape `(batch, keys)`, *optional*):
            Index of the first key that the query at each index sees, ascending. For windows over tokens some of which
            have been left out; `window` still bounds how many keys a query sees.
        sinks (`torch.Tensor` of shape `(heads,)`, *optional*):
            gpt-oss's learned sink logit a head.
        impl (`str`, *optional*, defaults to `"auto"`):
            `"auto"` (Triton on a GPU, torch on the CPU and for heads that the Triton kernels cannot hold in registers:
            above 256 in 16 bits, above 64 in float32), `"triton"`, `"torch"` or `"reference"` (which leaves `key` and
            `value` as they are).

    Returns:
        `torch.Tensor` of shape `(batch, rows, heads, value_dim)`, contiguous; zeros in empty slots.

    Raises:
        ValueError: shapes do not fit together, `key` or `value` ask for a gradient, or `impl` is unknown or cannot run
            here.
    """
    _check(query, fresh_key, fresh_value, key, value, rows, segments, window, first_keys)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    arguments = (query, fresh_key, fresh_value, key, value, rows, segments, scale, softcap, window, first_keys, sinks)
    impl = resolve_attention_impl(impl, query, value.shape[-1])
    if impl == "reference":
        return selected_attention_reference(*arguments)
    return _SelectedAttention.apply(*arguments, impl)


def _check(query, fresh_key, fresh_value, key, value, rows, segments, window, first_keys):
    if key.requires_grad or value.requires_grad:
        raise ValueError(
            "scouted `key` and `value` must not require grad: scout under torch.no_grad() or detach them."
        )
    check_attention(query, key, rows, segments, window, value, first_keys)
    for name, fresh, states in (("key", fresh_key, key), ("value", fresh_value, value)):
        if fresh.shape != (*states.shape[:2], rows.shape[1], states.shape[3]):
            raise ValueError(
                f"`fresh_{name}` {tuple(fresh.shape)} must have the shape of `{name}` {tuple(states.shape)} with "
                f"{rows.shape[1]} rows in place of {states.shape[2]}."
            )


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    first_keys: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor | None]:
    """
    Attention of *all* rows under the same rule on positions.

    Takes torch's own fused attention where nothing but causality applies (bit for bit what `sdpa` models compute);
    otherwise one launch of the Triton kernel, or on the CPU blocks of rows that read only the keys a causal row can
    see. Where a gradient is asked for, it is [`selected_attention`] of all rows.

    Args:
        query (`torch.Tensor` of shape `(batch, heads, n, dim)`):
            Queries of all rows.
        key, value (`torch.Tensor` of shape `(batch, kv_heads, n, dim)`, `(..., value_dim)`):
            Their keys and values.
        segments, scale, softcap, window, first_keys, sinks:
            As in [`selected_attention`].
        return_lse (`bool`, *optional*, defaults to `False`):
            Whether to return the log-sum-exp as well, which saves [`attention_mass`] half of its products.
        impl (`str`, *optional*, defaults to `"auto"`):
            `"auto"`, `"triton"` or `"torch"`: what runs where torch's fused attention does not apply.

    Returns:
        `torch.Tensor` of shape `(batch, n, heads, value_dim)`; with `return_lse` a pair of it and the log-sum-exp, a
        `torch.FloatTensor` of shape `(batch, heads, n)`, or `None` unless the Triton kernel ran, which has it
        anyway.

    Raises:
        ValueError: shapes do not fit together, or `impl` is unknown or cannot run here.
    """
    check_attention(query, key, None, segments, window, value, first_keys)
    batch, heads, n, dim = query.shape
    if key.shape[2] != n:
        raise ValueError(f"`key` {tuple(key.shape)} must have a row for each of the {n} queries.")
    scale = dim**-0.5 if scale is None else scale
    impl = resolve_attention_impl(impl, query, value.shape[-1], ("triton", "torch"))
    lse = None
    if (
        segments is None
        and softcap is None
        and sinks is None
        and (window is None or (window >= n and first_keys is None))
    ):
        grouped = heads != key.shape[1]
        output = F.scaled_dot_product_attention(query, key, value, is_causal=n > 1, scale=scale, enable_gqa=grouped)
        output = output.transpose(1, 2).contiguous()
    elif torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (query, key, value, sinks)):
        output = _differentiable(query, key, value, segments, scale, softcap, window, first_keys, sinks, impl)
    elif impl == "triton":
        rows = torch.arange(n, device=query.device).expand(batch, n)
        output, lse = _forward_op(query, key, value, rows, segments, scale, softcap, window, first_keys, sinks, impl)
    else:
        output = _causal_blocks(query, key, value, segments, scale, softcap, window, first_keys, sinks)
    return (output, lse) if return_lse else output


def _differentiable(query, key, value, segments, scale, softcap, window, first_keys, sinks, impl) -> Tensor:
    rows = torch.arange(query.shape[2], device=query.device).expand(query.shape[0], -1)
    copies = key.detach().clone(), value.detach().clone()
    rule = {"scale": scale, "softcap": softcap, "window": window, "first_keys": first_keys, "sinks": sinks}
    return selected_attention(query, key, value, *copies, rows, segments, impl=impl, **rule)


def _causal_blocks(query, key, value, segments, scale, softcap, window, first_keys, sinks) -> Tensor:
    batch, heads, n, _ = query.shape
    output = query.new_empty(batch, n, heads, value.shape[-1])
    rows = torch.arange(n, device=query.device).expand(batch, n)
    for block in row_blocks(n, 8 * batch * heads * n):
        keys = slice(0, block.stop)
        part, own_first = (None if given is None else given[:, keys] for given in (segments, first_keys))
        output[:, block] = _forward_op(
            query[:, :, block],
            key[:, :, keys],
            value[:, :, keys],
            rows[:, block],
            part,
            scale,
            softcap,
            window,
            own_first,
            sinks,
            "torch",
        )[0]
    return output
