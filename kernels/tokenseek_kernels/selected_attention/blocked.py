"""Plain torch implementation, blocked over query rows: forward gives output and log-sum-exp, backward recomputes."""

import torch

from ..scores import block_scores, group_heads, row_blocks, visible, wide


def selected_attention_forward(query, key, value, rows, segments, scale, softcap, window, sinks):
    """
    Attention of the selected rows over all keys.

    Returns:
        `(output, lse)`: `(batch, rows, heads, value_dim)` in the query's dtype and `(batch, heads, rows)` float32. The
        log-sum-exp counts the sink; it is +inf where a query sees nothing, so that its probabilities are 0.
    """
    batch, heads, n_rows, _ = query.shape
    output = query.new_empty(batch, n_rows, heads, value.shape[-1])
    lse = torch.empty(batch, heads, n_rows, dtype=lse_dtype(query), device=query.device)
    flash = query.device.type == "cpu" and softcap is None and query.shape[-1] == value.shape[-1]
    attend = _flash_block if flash else _dense_block
    # the flash kernel needs one additive mask for all heads, the dense one float32 scores a head
    row_bytes = batch * key.shape[2] * (2 * query.element_size() if flash else 8 * heads)
    for block in row_blocks(n_rows, row_bytes):
        seen = visible(rows[:, block], segments, key.shape[2], window)
        out, part = attend(query[:, :, block], key, value, seen, scale, softcap)
        if sinks is not None:
            # softmax with a sink is the plain softmax times the share of the mass that is not the sink's
            sink = wide(sinks).view(1, -1, 1)
            out = out * torch.sigmoid(part - sink).unsqueeze(-1).to(out.dtype)
            part = torch.logaddexp(part, sink)
        output[:, block] = out.transpose(1, 2)
        lse[:, :, block] = part.masked_fill(~seen.any(-1)[:, None], float("inf"))
    return output, lse


def lse_dtype(query: torch.Tensor) -> torch.dtype:
    """Log-sum-exp is kept in float32, or float64 for float64 inputs."""
    return torch.promote_types(query.dtype, torch.float32)


def _flash_block(query, key, value, seen, scale, softcap):
    bias = torch.zeros(seen.shape, dtype=query.dtype, device=query.device).masked_fill_(~seen, float("-inf"))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, False, attn_mask=bias[:, None], scale=scale
    )


def _dense_block(query, key, value, seen, scale, softcap):
    batch, heads, n_rows, _ = query.shape
    scores = block_scores(query, key, seen, scale, softcap)
    lse = scores.logsumexp(-1)
    # -inf - -inf would be NaN in a row that sees nothing
    probabilities = scores.sub_(lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1)).exp_()
    out = group_heads(probabilities, value.shape[1]) @ wide(value)
    return out.view(batch, heads, n_rows, -1).to(query.dtype), lse


def selected_attention_backward(grad, query, key, value, output, lse, rows, segments, scale, softcap, window, sinks):
    """
    Gradients of the selected rows: `(d_query, d_key, d_value, d_sinks)`, the middle two at the selected columns only,
    shapes `(batch, kv_heads, rows, dim)`; `d_sinks` is empty without sinks. Sums are kept in float32.
    """
    batch, heads, n_rows, _ = query.shape
    kv_heads, n_keys = key.shape[1], key.shape[2]
    key32, value32 = wide(key), wide(value)
    d_query = torch.empty_like(query)
    d_key = key32.new_zeros(batch, kv_heads, n_rows, key.shape[-1])
    d_value = value32.new_zeros(batch, kv_heads, n_rows, value.shape[-1])
    d_sinks = grad.new_zeros(0 if sinks is None else heads, dtype=lse.dtype)
    columns = rows.clamp(min=0)[:, None, None, :]
    empty = (rows < 0)[:, None, None, :]

    def at_selected(matrix):
        """Columns of the selected keys; an empty slot receives nothing."""
        index = columns.expand(-1, heads, matrix.shape[2], -1)
        return group_heads(matrix.gather(-1, index).masked_fill_(empty, 0.0), kv_heads).transpose(-1, -2)

    for block in row_blocks(n_rows, 16 * batch * heads * n_keys):
        seen = visible(rows[:, block], segments, n_keys, window)
        q, part = query[:, :, block], lse[:, :, block].unsqueeze(-1)
        d_out = wide(grad[:, block].transpose(1, 2))
        delta = (d_out * wide(output[:, block].transpose(1, 2))).sum(-1, keepdim=True)
        scores = block_scores(q, key, seen, scale, softcap)
        # the softcap's slope, 1 - tanh^2, from the capped score itself (masked scores have no slope)
        slope = None if softcap is None else 1 - scores.masked_fill(~seen[:, None], 0.0).div_(softcap).square_()
        probabilities = scores.sub_(part).exp_()
        grouped_out = group_heads(d_out, kv_heads)
        d_value += at_selected(probabilities) @ grouped_out
        d_scores = (grouped_out @ value32.transpose(-1, -2)).view_as(probabilities).sub_(delta).mul_(probabilities)
        if sinks is not None:
            d_sinks -= ((wide(sinks).view(1, -1, 1, 1) - part).exp() * delta).sum((0, 2, 3))
        if slope is not None:
            d_scores.mul_(slope)
        d_scores.mul_(scale)
        d_query[:, :, block] = (group_heads(d_scores, kv_heads) @ key32).view_as(q).to(query.dtype)
        d_key += at_selected(d_scores) @ wide(group_heads(q, kv_heads))
    return d_query, d_key.to(key.dtype), d_value.to(value.dtype), d_sinks
