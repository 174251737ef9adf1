"""Plain torch implementation, blocked over query rows: forward gives output and log-sum-exp, backward recomputes."""

import torch

from ..scores import group_heads, log_sum_exp, masked_scores, row_blocks, sees_itself, visible, wide, wide_dtype


def selected_attention_forward(query, key, value, rows, segments, scale, softcap, window, first_keys, sinks):
    """
    Attention of the selected rows over all keys.

    Returns:
        `(output, lse)`: `(batch, rows, heads, value_dim)` in the query's dtype and `(batch, heads, rows)` float32. The
        log-sum-exp counts the sink; it is +inf where a query sees nothing, so that its probabilities are 0.
    """
    batch, heads, n_rows, _ = query.shape
    output = query.new_empty(batch, n_rows, heads, value.shape[-1])
    lse = torch.empty(batch, heads, n_rows, dtype=wide_dtype(query), device=query.device)
    flash = _has_flash(query, value, softcap)
    attend = _flash_block if flash else _dense_block
    # the flash kernel needs one additive mask for all heads, the dense one float32 scores a head
    row_bytes = batch * key.shape[2] * (2 * query.element_size() if flash else 8 * heads)
    for block in row_blocks(n_rows, row_bytes):
        seen = visible(rows[:, block], segments, key.shape[2], window, first_keys)
        real = sees_itself(rows[:, block], segments)
        out, part = attend(query[:, :, block], key, value, seen, real, scale, softcap)
        if sinks is not None:
            # softmax with a sink is the plain softmax times the share of the mass that is not the sink's
            sink = wide(sinks).view(1, -1, 1)
            out = out * torch.sigmoid(part - sink).unsqueeze(-1).to(out.dtype)
            part = torch.logaddexp(part, sink)
        output[:, block] = out.transpose(1, 2)
        lse[:, :, block] = part.masked_fill(~real[:, None], float("inf"))
    return output, lse


def overlay_(states: torch.Tensor, fresh: torch.Tensor, rows: torch.Tensor) -> None:
    """Writes rows of `fresh` over their places in `states`; empty slots repeat the last real slot's."""
    last = (rows >= 0).sum(1, keepdim=True).sub(1).clamp(min=0)
    slot = torch.minimum(torch.arange(rows.shape[1], device=rows.device), last)
    index = rows.gather(1, slot).clamp(min=0)[:, None, :, None].expand_as(fresh)
    states.scatter_(2, index, fresh.gather(2, slot[:, None, :, None].expand_as(fresh)).to(states.dtype))


def _has_flash(query: torch.Tensor, value: torch.Tensor, softcap: float | None) -> bool:
    """Whether torch's fused CPU kernel can be used; it takes a mask, gives the log-sum-exp and groups heads."""
    return query.device.type == "cpu" and softcap is None and query.shape[-1] == value.shape[-1]


def _bias(seen: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """The mask of torch's fused kernels, one for all heads: -inf where a query does not see a key."""
    return torch.where(seen[:, None], query.new_zeros(()), float("-inf"))


def _flash_block(query, key, value, seen, real, scale, softcap):
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, False, attn_mask=_bias(seen, query), scale=scale
    )


def _dense_block(query, key, value, seen, real, scale, softcap):
    batch, heads, n_rows, _ = query.shape
    scores = masked_scores(query, key, seen, real, scale, softcap)
    probabilities = scores.softmax(-1)
    out = (group_heads(probabilities, value.shape[1]) @ wide(value)).view(batch, heads, n_rows, -1)
    return out.masked_fill_(~real[:, None, :, None], 0.0).to(query.dtype), log_sum_exp(scores, probabilities)


def selected_attention_backward(
    grad, query, key, value, output, lse, rows, segments, scale, softcap, window, first_keys, sinks
):
    """
    Gradients of the selected rows: `(d_query, d_key, d_value, d_sinks)`, the middle two at the selected columns only,
    shapes `(batch, kv_heads, rows, dim)`; `d_sinks` is empty without sinks. Sums are kept in float32.
    """
    batch, heads, n_rows, _ = query.shape
    kv_heads, n_keys = key.shape[1], key.shape[2]
    # in the layout of the projections behind it, as the output is
    d_query = query.new_empty(batch, n_rows, heads, query.shape[-1]).transpose(1, 2)
    d_key = key.new_zeros(batch, kv_heads, n_rows, key.shape[-1], dtype=lse.dtype)
    d_value = value.new_zeros(batch, kv_heads, n_rows, value.shape[-1], dtype=lse.dtype)
    d_sinks = grad.new_zeros(0 if sinks is None else heads, dtype=lse.dtype)
    # the fused backward is the faster one in float32 only
    flash = _has_flash(query, value, softcap) and query.dtype == torch.float32
    differentiate = _flash_backward_block if flash else _dense_backward_block
    for block in row_blocks(n_rows, 16 * batch * heads * n_keys):
        seen = visible(rows[:, block], segments, n_keys, window, first_keys)
        real = sees_itself(rows[:, block], segments)
        part, out = lse[:, :, block], output[:, block].transpose(1, 2)
        # a row that sees nothing has a softmax all the same; without an upstream gradient it does no harm
        d_out = grad[:, block].transpose(1, 2).masked_fill(~real[:, None, :, None], 0.0)
        sink_share = None
        if sinks is not None:
            sink_share = (wide(sinks).view(1, -1, 1) - part).exp()
            d_sinks -= (sink_share * (wide(d_out) * wide(out)).sum(-1)).sum((0, 2))
        d_query[:, :, block], of_key, of_value = differentiate(
            d_out, query[:, :, block], key, value, out, part, seen, real, rows, scale, softcap, sink_share
        )
        d_key += of_key
        d_value += of_value
    empty = (rows < 0)[:, None, :, None]
    d_key, d_value = d_key.masked_fill_(empty, 0.0), d_value.masked_fill_(empty, 0.0)
    return d_query, d_key.to(key.dtype), d_value.to(value.dtype), d_sinks


def _flash_backward_block(d_out, query, key, value, out, lse, seen, real, rows, scale, softcap, sink_share):
    """Gradients of one block; the fused kernel gives those of all keys, of which the selected ones are kept."""
    d_query, d_key, d_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        d_out, query, key, value, out, lse, 0.0, False, attn_mask=_bias(seen, query), scale=scale
    )
    index = rows.clamp(min=0)[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[-1])
    return d_query, d_key.gather(2, index), d_value.gather(2, index)


def _dense_backward_block(d_out, query, key, value, out, lse, seen, real, rows, scale, softcap, sink_share):
    """Gradients of one block from float32 scores, computed at the selected keys only."""
    kv_heads = key.shape[1]
    columns = rows.clamp(min=0)[:, None, None, :]

    def at_selected(matrix):
        index = columns.expand(-1, matrix.shape[1], matrix.shape[2], -1)
        return group_heads(matrix.gather(-1, index), kv_heads).transpose(-1, -2)

    scores = masked_scores(query, key, seen, real, scale, softcap)
    # the softcap's slope, 1 - tanh^2, from the capped score itself (masked scores have no slope)
    slope = None if softcap is None else 1 - scores.masked_fill(~seen[:, None], 0.0).div_(softcap).square_()
    probabilities = scores.softmax(-1)
    if sink_share is not None:
        probabilities.mul_(1 - sink_share.unsqueeze(-1))
    delta = (wide(d_out) * wide(out)).sum(-1, keepdim=True)
    grouped_out = group_heads(wide(d_out), kv_heads)
    d_value = at_selected(probabilities) @ grouped_out
    d_scores = (grouped_out @ wide(value).transpose(-1, -2)).view_as(probabilities).sub_(delta).mul_(probabilities)
    if slope is not None:
        d_scores.mul_(slope)
    d_query = (group_heads(d_scores, kv_heads) @ wide(key)).mul_(scale).view_as(query)
    d_key = (at_selected(d_scores) @ wide(group_heads(query, kv_heads))).mul_(scale)
    return d_query, d_key, d_value
