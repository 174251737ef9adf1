"""`loss="kept"`: labels of tokens that every layer has computed stand for all labels."""

import pytest
import torch
import torch.nn.functional as F

from hf_tokenseek import attach
from tests.lemo.deep_lemo import batch, computed_tokens, kept_rows, llama
from tests.lemo.tiny_lemo import lemo

LAYOUTS = ("whole", "left", "right", "packed")
# layers choose differently, so that few tokens are computed by all of them
FEW = {"rescore": 1, "score": "random", "labelled": False, "keep": 0.6}


def reference(logits, labels, counts) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Summed loss of labels whose predicting tokens count, how many these are, and how many labels there are."""
    targets = labels[:, 1:].masked_fill(~counts[:, :-1], -100)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten(), reduction="sum")
    return loss, (targets != -100).sum(), (labels[:, 1:] != -100).sum()


@pytest.mark.parametrize("mlp", ["tokens", "dense"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_is_the_mean_over_labels_of_tokens_that_all_layers_have_computed(layout, mlp):
    model, inputs = llama(), batch(layout)
    before = inputs["labels"].clone()
    with attach(model, lemo=lemo(mlp=mlp, **FEW)) as handle:
        output = model(**inputs)
        counts = computed_tokens(kept_rows(handle), inputs["labels"].shape[1])
    loss, kept, labelled = reference(output.logits, inputs["labels"], counts)
    assert 0 < kept < labelled
    torch.testing.assert_close(output.loss, (loss / kept).to(output.loss.dtype), rtol=1e-6, atol=0)
    assert torch.equal(inputs["labels"], before)


@pytest.mark.parametrize("items", [torch.tensor(200), 200, 57.0], ids=str)
def test_the_trainers_count_divides_and_the_labels_that_are_left_stand_for_all(items):
    model, inputs = llama(), batch("right")
    with attach(model, lemo=lemo(**FEW)) as handle:
        output = model(**inputs, num_items_in_batch=items)
        counts = computed_tokens(kept_rows(handle), inputs["labels"].shape[1])
    loss, kept, labelled = reference(output.logits, inputs["labels"], counts)
    expected = loss / items * labelled / kept
    torch.testing.assert_close(output.loss, expected.to(output.loss.dtype), rtol=1e-6, atol=0)


@pytest.mark.parametrize("fields", [{"loss": "all"}, {"mode": "detach"}, {"mode": "detach", "loss": "all"}], ids=str)
def test_all_labels_count_where_it_is_asked_for(fields):
    model, inputs = llama(), batch("right")
    with attach(model, lemo=lemo(**{**FEW, **fields})):
        output = model(**inputs)
    loss, kept, labelled = reference(output.logits, inputs["labels"], torch.ones_like(inputs["labels"]).bool())
    assert kept == labelled
    torch.testing.assert_close(output.loss, (loss / kept).to(output.loss.dtype), rtol=1e-6, atol=0)


def lost(items=None) -> tuple:
    """A step whose only labels are those of a block that no layer keeps."""
    model, inputs = llama(), batch("whole", n=40)
    inputs["labels"] = inputs["labels"].masked_fill((torch.arange(40) - 10).abs() > 1, -100)
    with attach(model, lemo=lemo(score="recency", labelled=False)) as handle:
        output = model(**inputs, num_items_in_batch=items)
        assert not computed_tokens(kept_rows(handle), 40)[:, 8:11].any()
    output.loss.backward()
    return model, inputs, output


@pytest.mark.parametrize("items", [None, 300])
def test_a_micro_batch_that_has_lost_all_labels_trains_with_them(items):
    model, inputs, output = lost(items)
    loss, kept, _ = reference(output.logits, inputs["labels"], torch.ones_like(inputs["labels"]).bool())
    torch.testing.assert_close(output.loss, (loss / (items or kept)).to(output.loss.dtype), rtol=1e-6, atol=0)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("seek", [None, {"context": 0.5, "plain_fallback": False}], ids=["alone", "seek"])
def test_a_micro_batch_without_labels_is_zero_and_connected(seek):
    model, inputs = llama(), batch()
    labels = torch.full_like(inputs["labels"], -100)
    with attach(model, lemo=lemo(), seek=seek):
        loss = model(input_ids=inputs["input_ids"], labels=labels, num_items_in_batch=torch.tensor(7)).loss
    loss.backward()
    assert loss == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_training_without_labels_is_refused():
    model, ids = llama(), batch()["input_ids"]
    with (
        attach(model, lemo=lemo()),
        pytest.raises(ValueError, match=r"needs `labels`.*set loss='all' or mode='detach'"),
    ):
        model(input_ids=ids)
    for fields in ({"loss": "all"}, {"mode": "detach"}):
        with attach(model, lemo=lemo(**fields)):
            assert model(input_ids=ids).logits.requires_grad


def test_masks_of_another_shape_are_refused():
    model, inputs = llama(), batch()
    with attach(model, lemo=lemo()), pytest.raises(ValueError, match=r"2-D attention mask of shape \(2, 42\)"):
        model(**inputs, attention_mask=torch.ones(2, 1, 42, 42))


@pytest.mark.parametrize("fields", [{}, {"loss": "all"}, {"mode": "detach"}], ids=str)
def test_a_micro_batch_without_labels_is_a_zero_that_every_parameter_has_part_in(fields):
    model, inputs = llama(), batch("right")
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    with attach(model, lemo=lemo(**fields)):
        loss = model(**inputs).loss
        loss.backward()
    assert loss == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("items", [None, 57])
def test_a_tuple_has_the_same_loss_first(items):
    inputs = batch("right")
    losses = []
    for return_dict in (True, False):
        model = llama()
        with attach(model, lemo=lemo(**FEW)):
            losses.append(model(**inputs, num_items_in_batch=items, return_dict=return_dict)[0])
    assert torch.equal(*losses)


def test_sparse_evaluation_has_the_same_loss_beside_tokenseek():
    losses = []
    for seek in (None, {"context": 0.3}):
        model, inputs = llama(), batch("right")
        with attach(model, lemo=lemo(**FEW), seek=seek) as handle, handle.lemo.everywhere(), torch.no_grad():
            losses.append(model.eval()(**inputs).loss)
    assert torch.equal(*losses)
