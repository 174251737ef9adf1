"""`score="previous_layer"`: what attention in the last layer on all tokens gives a block, against eager attention."""

import pytest
import torch

from hf_tokenseek import attach
from hf_tokenseek.seek.batch import IGNORE
from tests.lemo.deep_lemo import assert_close_gradients, assert_same_gradients, batch, kept_rows, lemo_step, llama
from tests.lemo.naive import naive_lemo
from tests.lemo.test_checkpointing import checkpointed
from tests.lemo.tiny_lemo import lemo, make_inputs
from tests.seek.tiny_families import tiny_model

LAYOUTS = ("whole", "left", "right", "packed")
PREVIOUS = {"score": "previous_layer", "dense_first": 1}


def eager_scores(model, inputs, layer: int, blocks, asking) -> torch.Tensor:
    """`(batch, blocks)`: sums over heads, over queries of blocks that ask, and over a block's tokens as keys."""
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        received = model(**inputs, use_cache=False, output_attentions=True).attentions[layer].sum(1)
    model.set_attn_implementation(implementation)
    scores = torch.zeros(len(received), blocks.count)
    for row, own in enumerate(blocks.tokens):
        asked = torch.cat([block[block >= 0] for block, asks in zip(own, asking[row], strict=True) if asks])
        for index, block in enumerate(own):
            scores[row, index] = received[row][asked][:, block[block >= 0]].sum()
    return scores


# plain, with a window in a layer, with softcaps, with sinks; gpt_oss's own mask does not keep packed documents apart
CASES = [
    (family, layout)
    for family in ("llama", "mistral", "gemma2", "gpt_oss")
    for layout in LAYOUTS
    if (family, layout) != ("gpt_oss", "packed")
]


@pytest.mark.parametrize(("family", "layout"), CASES)
@pytest.mark.parametrize("queries", ["labelled", "later", "all"])
def test_is_the_attention_that_blocks_receive_from_those_that_ask(family, queries, layout):
    model, inputs = tiny_model(family).train(), make_inputs(layout)
    # few blocks with labels, and none in the second sequence
    labels = torch.full_like(inputs["labels"], IGNORE)
    labels[0, 18:22] = 5
    inputs["labels"] = labels
    with attach(model, lemo=lemo(**PREVIOUS, queries=queries)) as handle:
        model(**inputs)
        elimination = handle.lemo.elimination
    blocks = elimination.blocks
    asking = blocks.exists.clone()
    if queries == "labelled":
        asking[0] = ((blocks.tokens[0] >= 17) & (blocks.tokens[0] <= 20)).any(1)
        assert 1 <= asking[0].sum() < blocks.count
    expected = eager_scores(model, inputs, 0, blocks, asking)
    torch.testing.assert_close(elimination.scores, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["elide", "detach"])
@pytest.mark.parametrize("mlp", ["tokens", "dense"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_step_is_that_of_the_plain_model_without_what_is_dropped(layout, mlp, mode):
    """The layer that is watched computes what it would."""
    model, inputs = llama(torch.float32), batch(layout)
    found = lemo_step(model, inputs, **PREVIOUS, mode=mode, mlp=mlp, loss="all")
    assert sorted(found[3]) == [1, 2, 3] and all(torch.equal(found[3][1], rows) for rows in found[3].values())
    model.zero_grad()
    rows = {0: torch.arange(42).expand(2, -1)} if mode == "detach" else {}
    loss = naive_lemo(model, rows | found[3], inputs, mode, mlp).loss
    loss.backward()
    torch.testing.assert_close(found[0], loss, rtol=1e-5, atol=0)
    assert_close_gradients(found[1], {name: p.grad for name, p in model.named_parameters()}, 1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_compute_again_what_was_chosen(reentrant):
    inputs = batch("right")
    plain = lemo_step(llama(), inputs, **PREVIOUS)
    found = lemo_step(checkpointed(llama(), reentrant), inputs, **PREVIOUS)
    assert torch.equal(found[0], plain[0]) and found[2] < plain[2]
    assert_same_gradients(found[1], plain[1])


def test_with_seek_scouting_is_watched():
    """TokenSeek's own state goes on collecting: keys and values of the layer, and its evidence."""
    inputs = batch("left")
    alone = lemo_step(llama(), inputs, **PREVIOUS)
    with attach(model := llama(), seek={"context": 0.5}, lemo=lemo(**PREVIOUS)) as handle:
        model(**inputs)
        assert kept_rows(handle).keys() == alone[3].keys()
        assert all(torch.equal(rows, alone[3][layer]) for layer, rows in kept_rows(handle).items())


def test_a_list_of_shares_may_begin_to_drop_later():
    with attach(model := llama(), lemo=lemo(**PREVIOUS, keep=[1.0, 1.0, 0.5, 1.0])) as handle:
        model(**batch())
        elimination = handle.lemo.elimination
    assert list(elimination.kept) == [2]
    assert (elimination.scores[elimination.blocks.exists] > 0).all()
