"""
Identity 4: what comes of reusing scouted keys and values is what the paper's two groups of rows give.

There every layer runs twice with the same weights: ditched rows without gradient, selected rows with, and the queries
of both attend to the keys and values of both. Written out here for Llama, one sequence at a time, in float64.
"""

import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hf_tokenseek import SeekConfig, attach

N = 24


class Group:
    """Rows of one sequence on their way through the decoder, with gradient or without."""

    def __init__(self, model, ids, rows, trained):
        self.model, self.rows, self.trained = model, rows, trained
        with self.mode():
            self.hidden = model.model.embed_tokens(ids[rows])[None]

    def mode(self):
        return torch.set_grad_enabled(self.trained)

    def project(self, layer):
        """Queries, keys and values at the rows' own positions, each `(1, heads, rows, head_dim)`."""
        with self.mode():
            normed, attention = layer.input_layernorm(self.hidden), layer.self_attn
            parts = [p(normed) for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
            query, key, value = (p.unflatten(2, (-1, attention.head_dim)).transpose(1, 2) for p in parts)
            query, key = apply_rotary_pos_emb(query, key, *self.model.model.rotary_emb(normed, self.rows[None]))
        return query, key, value

    def run(self, layer, query, keys, values, positions):
        """The rest of the layer, given the keys and values of both groups and where they stand."""
        with self.mode():
            keys, values = (part.repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (keys, values))
            scores = query @ keys.transpose(2, 3) * layer.self_attn.scaling
            hidden = positions[None] > self.rows[:, None]
            mixed = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ values
            self.hidden = self.hidden + layer.self_attn.o_proj(mixed.transpose(1, 2).flatten(2))
            self.hidden = self.hidden + layer.mlp(layer.post_attention_layernorm(self.hidden))


def two_group_loss(model, ids, targets, selected, ditched):
    """The summed loss of the selected rows of one sequence."""
    groups = Group(model, ids, ditched, trained=False), Group(model, ids, selected, trained=True)
    positions = torch.cat([ditched, selected])
    for layer in model.model.layers:
        queries, keys, values = zip(*(group.project(layer) for group in groups), strict=True)
        keys, values = torch.cat(keys, 2), torch.cat(values, 2)
        for group, query in zip(groups, queries, strict=True):
            group.run(layer, query, keys, values, positions)
    logits = model.lm_head(model.model.norm(groups[1].hidden))[0]
    return F.cross_entropy(logits, targets[selected], reduction="sum")


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("budget", [{"context": 0.0}, {"context": 0.3}, {"ratio": 0.4, "score": "random"}], ids=str)
def test_reuse_of_keys_and_values_equals_the_two_groups(tiny_llama, budget, reentrant):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1, 128, (3, N), generator=generator)
    # on the left, on the right, nowhere
    real = torch.stack([torch.arange(N) >= 6, torch.arange(N) < N - 4, torch.arange(N) >= 0])
    labels = ids.masked_fill((torch.rand(3, N, generator=generator) > 0.4) | ~real, -100)
    labels[0, 6] = -100  # padding would predict it
    model = tiny_llama().double()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with attach(model, seek=SeekConfig(**budget, plain_fallback=False)) as handle:
        loss = model(input_ids=ids, attention_mask=real.long(), labels=labels, num_items_in_batch=1).loss
        loss.backward()
        chosen = [rows[rows >= 0] for rows in handle.selection]
    truth, total = tiny_llama().double(), 0
    for own, tokens, answers, present in zip(chosen, ids, labels, real, strict=True):
        ditched = torch.tensor(sorted({*present.nonzero().flatten().tolist()} - {*own.tolist()}))
        assert len(own) and len(ditched)
        # a row predicts the next token, selected or not
        targets = F.pad(answers, (0, 1), value=-100)[1:]
        # with a budget the kept losses stand for all of their sequence
        count, kept = ((part != -100).sum() for part in (targets, targets[own]))
        total = total + two_group_loss(truth, tokens, targets, own, ditched) * count / kept
    total.backward()
    # norms and the loss itself are computed in float32 whatever the model has
    torch.testing.assert_close(loss.double(), total, rtol=2**-20, atol=0)
    for (name, own), other in zip(model.named_parameters(), truth.parameters(), strict=True):
        difference = (own.grad - other.grad).abs().max() / other.grad.abs().max()
        assert difference <= 2**-20, f"{name}: {difference}"
