"""What makes a block worth keeping, against loops over the layer's own states; and what it knows of the future."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hf_tokenseek import attach
from hf_tokenseek.lemo.blocks import Blocks
from hf_tokenseek.lemo.config import QUERIES
from hf_tokenseek.lemo.recording import oracle_scores, record, recording
from hf_tokenseek.lemo.scores import Scorer, looks, pool
from hf_tokenseek.seek.batch import IGNORE
from tests.lemo.tiny_lemo import BLOCK, lemo, make_inputs
from tests.seek.tiny_families import tiny_model

LAYOUTS = ("whole", "left", "right", "packed")


def counted(query: int, key: int, queries: str) -> bool:
    """Whether a query's look at a key counts, by their indices."""
    return queries == "all" or (query <= key if queries == "earlier" else query >= key)


def seen(model, inputs, config):
    """Each layer's input, rotations and call, and the blocks."""
    found = []
    with recording(model):
        record(model, inputs, config, lambda index, call, blocks: found.append((call, blocks)))
    return found


def attention_states(layer, hidden, rotations):
    """A llama layer's own queries and keys `(batch, heads, n, dim)`, rotated or not."""
    attention, normed = layer.self_attn, layer.input_layernorm(hidden)
    states = (attention.q_proj(normed), attention.k_proj(normed))
    query, key = (own.unflatten(2, (-1, attention.head_dim)).transpose(1, 2) for own in states)
    return (query, key) if rotations is None else apply_rotary_pos_emb(query, key, *rotations)


def by_hand(query, key, blocks: Blocks, segments, asking, queries):
    """The paper's equations 1 to 4, block by block: the largest mean over heads of a positive score, in columns."""
    scores = torch.zeros(query.shape[0], blocks.count)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    pairs = (query @ key.mT).clamp(min=0).mean(1)
    order = [[i for i in row.flatten().tolist() if i >= 0] for row in blocks.tokens]
    for b, positions in enumerate(order):
        for n in range(len(positions)):
            for m in range(len(positions)):
                i, j = positions[m], positions[n]
                if not counted(m, n, queries) or segments[b, i] != segments[b, j] or not asking[b, m // BLOCK]:
                    pairs[b, i, j] = 0
        parts = [positions[first : first + BLOCK] for first in range(0, len(positions), BLOCK)]
        for n, keys in enumerate(parts):
            scores[b, n] = sum(pairs[b][own][:, keys].max() for own in parts)
    return scores


@pytest.mark.parametrize("queries", QUERIES)
@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_the_oracle_is_the_papers_score_of_the_layers_own_queries_and_keys(layout, rope, queries):
    model, inputs = tiny_model("llama"), make_inputs(layout)
    # few blocks with labels, and none in the second sequence
    labels = torch.full_like(inputs["labels"], IGNORE)
    labels[0, 18:22] = 5
    inputs["labels"] = labels
    config = lemo(queries=queries, rope=rope)
    with recording(model):
        found, blocks = oracle_scores(model, inputs, config)
    asking = blocks.exists.clone()
    if queries == "labelled":
        # positions 17 to 20 predict a label
        tokens = blocks.tokens[0]
        asking[0] = ((tokens >= 17) & (tokens <= 20)).any(1)
        assert 1 <= asking[0].sum() < blocks.count
    for layer, (call, _), scores in zip(model.model.layers, seen(model, inputs, config), found, strict=True):
        rotations = call._kwargs["position_embeddings"] if rope else None
        query, key = attention_states(layer, call.hidden, rotations)
        expected = by_hand(query, key, blocks, blocks.segments, asking, queries)
        torch.testing.assert_close(scores.masked_fill(~blocks.exists, 0.0), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_positions_matter_only_with_rope():
    """Rotations are relative: a constant shift changes nothing, other distances do."""
    model, inputs = tiny_model("llama"), make_inputs("whole")
    positions = torch.arange(42).expand(2, -1)
    scores = {
        (rope, name): oracle_of(model, inputs, lemo(rope=rope, queries="later"), places)[0]
        for rope in (False, True)
        for name, places in (("plain", positions), ("shifted", positions + 7), ("spread", positions * 3))
    }
    for name in ("shifted", "spread"):
        torch.testing.assert_close(scores[False, name], scores[False, "plain"])
    torch.testing.assert_close(scores[True, "shifted"], scores[True, "plain"], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(scores[True, "spread"], scores[True, "plain"], rtol=1e-2)


def oracle_of(model, inputs, config, positions):
    """The first layer's scores: there hidden states are embeddings, whatever the positions are."""
    with recording(model):
        found = []
        scorer = Scorer(config, (0, 0))
        # spread positions would be read as packed documents
        inputs = {"input_ids": inputs["input_ids"]}
        rotations = model.model.rotary_emb(torch.zeros(1), positions)

        def see(index, call, blocks):
            call._kwargs["position_embeddings"] = rotations
            found.append(scorer.oracle(index, call, blocks))

        record(model, inputs, config, see)
    return found


@torch.no_grad()
def test_scores_follow_the_length_of_queries():
    """Identity 9, through the model: weights of the query projection times four."""
    model, inputs = tiny_model("llama"), make_inputs("right")
    with recording(model):
        before = oracle_scores(model, inputs, lemo())[0][0]
        model.model.layers[0].self_attn.q_proj.weight.mul_(4)
        after = oracle_scores(model, inputs, lemo())[0][0]
    torch.testing.assert_close(after, 4 * before)
    assert (before >= 0).all()


@pytest.mark.parametrize("documents", [[36], [12, 4, 20], [1, 2, 3, 9, 1, 13, 7]])
@pytest.mark.parametrize("queries", QUERIES)
def test_sums_of_products_are_products_with_sums(queries, documents):
    """Identity 11: against the blocks x blocks product; blocks see each other that share a document."""
    generator = torch.Generator().manual_seed(0)
    # nine blocks of four tokens, and two padded sequences
    numbers = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(documents)).expand(3, -1).clone()
    numbers[1, 30:], numbers[2, :5] = -1, -1
    targets = torch.where(torch.rand(3, 36, generator=generator) < 0.1, 7, IGNORE)
    blocks = Blocks(numbers, targets, [36, 30, 31], lemo(block=4))
    query = torch.randn(3, 6, 9, 5, generator=generator, dtype=torch.float64)
    key = torch.randn(3, 2, 9, 5, generator=generator, dtype=torch.float64)
    products = query @ key.repeat_interleave(3, 1).mT
    found = looks(query, key, blocks, queries)
    for row in range(3):
        inside = [{numbers[row, i].item() for i in block} for block in tokens_of(blocks)[row]]
        asking = blocks.asking(queries)[row]
        for n, own in enumerate(inside):
            asked = [m for m, other in enumerate(inside) if asking[m] and own & other and counted(m, n, queries)]
            expected = products[row, :, asked, n].sum().float()
            torch.testing.assert_close(found[row, n], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pool_is_the_mean_of_a_blocks_tokens(layout):
    inputs = make_inputs(layout)
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    real = mask.sum(1).tolist()
    blocks = Blocks(torch.where(mask > 0, 0, -1), torch.full_like(mask, IGNORE), real, lemo())
    hidden = torch.randn(2, 42, 8, generator=torch.Generator().manual_seed(0))
    means = pool(hidden.masked_fill(mask[:, :, None] == 0, float("nan")), blocks)
    for b in range(2):
        positions = mask[b].nonzero().flatten()
        own = [hidden[b, part].mean(0) for part in positions.split(BLOCK)]
        torch.testing.assert_close(means[b, : len(own)], torch.stack(own))
        assert (means[b, len(own) :] == 0).all()


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("queries", QUERIES)
@torch.no_grad()
def test_pooled_scores_are_looks_of_mean_queries_at_mean_keys(queries, rope):
    model, inputs = tiny_model("llama"), make_inputs("left")
    config = lemo(queries=queries, rope=rope)
    scorer = Scorer(config, (0, 0))
    with recording(model):
        found = []
        record(
            model, inputs, config, lambda i, call, blocks: found.append((scorer.pooled(i, call, blocks), call, blocks))
        )
    for layer, (scores, call, blocks) in zip(model.model.layers, found, strict=True):
        means = pool(call.hidden, blocks)
        rotations = None
        if rope:
            # of the token in the middle
            middle = [[row[(len(row) - 1) // 2] for row in own] for own in tokens_of(blocks)]
            rotations = [
                torch.stack([given[b][[*own, *[0] * (blocks.count - len(own))]] for b, own in enumerate(middle)])
                for given in (values.expand(2, -1, -1) for values in call._kwargs["position_embeddings"])
            ]
        query, key = attention_states(layer, means, rotations)
        expected = looks(query, key, blocks, queries)
        torch.testing.assert_close(scores[blocks.exists], expected[blocks.exists], rtol=1e-4, atol=1e-4)


def tokens_of(blocks: Blocks) -> list[list[list[int]]]:
    """Positions of each block of each sequence."""
    rows = [[[i for i in block if i >= 0] for block in row] for row in blocks.tokens.tolist()]
    return [[block for block in row if block] for row in rows]


def outputs(model, ids, config):
    """Logits of the sparse model, and which blocks its layers have kept."""
    with attach(model, lemo=config) as handle, handle.lemo.everywhere(), torch.no_grad():
        logits = model(input_ids=ids).logits
        return logits, [kept.blocks for kept in handle.lemo.elimination.kept.values()]


def leaks(config, tries: int = 30) -> int:
    """In how many of `tries` texts the outputs of earlier blocks change with a token of a later one."""
    model, found = tiny_model("llama").eval(), 0
    for seed in range(tries):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(5, 200, (1, 64), generator=generator)
        at = int(torch.randint(BLOCK, 60, (1,), generator=generator))
        changed = ids.clone()
        changed[0, at] = (ids[0, at] + 50) % 190 + 5
        (before, kept), (after, kept_after) = (outputs(model, own, config) for own in (ids, changed))
        block = at // BLOCK
        early = [[own[(own < block) & (own >= 0)] for own in chosen] for chosen in (kept, kept_after)]
        same = all(map(torch.equal, *early))
        close = torch.allclose(before[:, : block * BLOCK], after[:, : block * BLOCK], rtol=1e-4, atol=1e-4)
        # outputs are what the choices make of them
        assert same == close
        found += not close
    return found


@pytest.mark.parametrize("bounds", [[0.1, 0.3], [0.5, 0.6], [0.1, 0.9]], ids=str)
@pytest.mark.parametrize("score", ["pooled", "oracle"])
@pytest.mark.parametrize("rescore", [0, 1])
def test_no_later_token_changes_an_earlier_output(score, bounds, rescore):
    """Identity 12."""
    config = lemo(score=score, queries="earlier", thresholds=[1.0, 1.2], bounds=bounds, loss="all", rescore=rescore)
    assert leaks(config) == 0


@pytest.mark.parametrize("fields", [{"keep": 0.3}, {"thresholds": [1.0, 1.2], "bounds": [0.1, 0.3]}], ids=str)
@pytest.mark.parametrize("score", ["pooled", "oracle"])
def test_published_choices_look_into_the_future(score, fields):
    """The leak that identity 12 documents."""
    assert leaks(lemo(score=score, queries="all", loss="all", **fields)) > 0


def test_a_share_of_all_blocks_looks_into_the_future_whoever_asks():
    assert leaks(lemo(score="oracle", queries="earlier", keep=0.3, loss="all")) > 0


def test_random_scores_are_of_their_place():
    model, inputs = tiny_model("llama"), make_inputs("whole", n=160)
    chosen = {}
    with attach(model, lemo=lemo(score="random", rescore=1)) as handle:
        for step in (0, 1, 0):
            handle.lemo.begin_step(step)
            for micro in (0, 1):
                model(**inputs)
                kept = handle.lemo.elimination.kept
                chosen.setdefault((step, micro), []).append([kept[layer].blocks for layer in (0, 1)])
    for first, again in (chosen[0, 0], chosen[0, 1]):
        assert all(map(torch.equal, first, again))
    flat = [own for runs in chosen.values() for own in runs[0]]
    assert all(not torch.equal(a, b) for i, a in enumerate(flat) for b in flat[:i])


def test_recency_keeps_the_last_blocks():
    model, inputs = tiny_model("llama"), make_inputs("right", n=160)
    with attach(model, lemo=lemo(score="recency", labelled=False, keep=0.25)) as handle:
        model(**inputs)
        blocks = handle.lemo.elimination.kept[0].blocks
        counts = handle.lemo.elimination.blocks.counts
    for own, count in zip(blocks.tolist(), counts, strict=True):
        size = count // 4
        assert [index for index in own if index >= 0] == [0, *range(count - size + 1, count)]
