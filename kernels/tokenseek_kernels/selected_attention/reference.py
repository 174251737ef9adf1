"""Dense, naive attention of selected rows: the truth that every other implementation is compared with."""

import torch

from ..scores import visible


def overlay_reference(states: torch.Tensor, fresh: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """A copy of `states` with the fresh rows in their places; gradient reaches `fresh` only."""
    states = states.detach().clone()
    for b, own in enumerate(rows):
        keep = own >= 0
        states[b, :, own[keep]] = fresh[b, :, keep].to(states.dtype)
    return states


def selected_attention_reference(
    query, fresh_key, fresh_value, key, value, rows, segments, scale, softcap, window, first_keys, sinks
):
    """As [`selected_attention`], everything dense and through autograd. Returns `(batch, rows, heads, value_dim)`."""
    group = query.shape[1] // key.shape[1]
    key = overlay_reference(key, fresh_key, rows).repeat_interleave(group, 1)
    value = overlay_reference(value, fresh_value, rows).repeat_interleave(group, 1)
    scores = query @ key.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    seen = visible(rows, segments, key.shape[2], window, first_keys)[:, None]
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        column = sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        probabilities = torch.cat([scores, column.to(scores.dtype)], -1).softmax(-1)[..., :-1]
    else:
        # a query that sees nothing gives zeros, not NaN
        empty = ~seen.any(-1, keepdim=True)
        probabilities = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    return (probabilities @ value).transpose(1, 2)
