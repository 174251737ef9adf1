"""Plain torch implementation, blocked over query rows."""

import torch

from ..scores import log_sum_exp, masked_scores, row_blocks, sees_itself, visible, wide


def attention_mass(query, key, rows, segments, scale, softcap, window, first_keys, sinks, lse) -> torch.Tensor:
    """As [`attention_mass`], the door."""
    mass = torch.zeros(key.shape[0], key.shape[2], dtype=torch.float32, device=query.device)
    for block in row_blocks(query.shape[2], 8 * query.shape[0] * query.shape[1] * key.shape[2]):
        seen = visible(rows[:, block], segments, key.shape[2], window, first_keys)
        real = sees_itself(rows[:, block], segments)
        scores = masked_scores(query[:, :, block], key, seen, real, scale, softcap)
        if lse is not None:
            # +inf where a row sees nothing: no mass
            mass += scores.sub_(lse[:, :, block].unsqueeze(-1)).exp_().sum((1, 2))
            continue
        probabilities = scores.softmax(-1)
        # a row that sees nothing gives no mass
        weights = real[:, None].to(scores.dtype).expand(scores.shape[:3])
        if sinks is not None:
            weights = weights * torch.sigmoid(log_sum_exp(scores, probabilities) - wide(sinks).view(1, -1, 1))
        mass += (weights.unsqueeze(-2) @ probabilities).sum((1, 2))
    return mass
