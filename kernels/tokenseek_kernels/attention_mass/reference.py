"""Dense column sums of softmax attention."""

import torch

from ..scores import visible


def attention_mass_reference(query, key, rows, segments, scale, softcap, window, first_keys, sinks):
    """Same arguments as [`attention_mass`]; builds the whole probability matrix. Returns `(batch, keys)`."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query @ key.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    seen = visible(rows, segments, key.shape[2], window, first_keys)[:, None]
    weights = scores.exp() * seen
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.reshape(1, -1, 1, 1).exp()
    return (weights / total.clamp(min=1e-300 if weights.dtype == torch.float64 else 1e-30)).sum((1, 2))
