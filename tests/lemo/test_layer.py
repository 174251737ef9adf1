"""What a layer on kept rows is: the plain layer at the kept tokens, nothing at all at the others."""

import pytest
import torch

from hf_tokenseek import attach
from tests.ist.tiny_ist import layers_of, step
from tests.lemo.deep_lemo import (
    ALL_KEPT,
    LAYERS,
    assert_close_gradients,
    assert_same_gradients,
    batch,
    kept_rows,
    lemo_step,
    llama,
)
from tests.lemo.naive import kept_tokens, naive_lemo
from tests.lemo.tiny_lemo import lemo

LAYOUTS = ("whole", "left", "right", "packed")
MODES = ("elide", "detach")
# sums of at most 128 products in another order, with 53 and with 24 bits
EXACT, ROUNDED = 128 * 2**-53, 128 * 2**-24
# the choice follows from places alone: the first block and the last ones, with a gap between them
BY_PLACE = {"score": "recency", "labelled": False}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fields", [{"keep": 1.0}, {"keep": [1.0] * LAYERS}, {"keep": 1.0, "mode": "detach"}], ids=str)
def test_all_layers_dense_is_plain_training_to_the_bit(dtype, fields):
    """Identity 1."""
    model, inputs = llama(dtype), batch("right")
    logits, plain = model(**inputs).logits, step(model, inputs)
    with attach(model, lemo=lemo(**fields)):
        assert torch.equal(model(**inputs).logits, logits)
        found = step(model, inputs)
    assert torch.equal(found[0], plain[0]) and found[2] == plain[2]
    assert_same_gradients(found[1], plain[1])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, ROUNDED), (torch.float64, EXACT)], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_tokens_kept_is_plain_training(dtype, tolerance, mode, layout):
    """Identities 1 and 25, through the gathered rows."""
    model, inputs = llama(dtype), batch(layout)
    plain, found = step(model, inputs), lemo_step(model, inputs, mode=mode, **ALL_KEPT)
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    assert all(torch.equal(kept_tokens(rows, real.shape[1]), real) for rows in found[3].values())
    assert len(found[3]) == LAYERS
    torch.testing.assert_close(found[0], plain[0], rtol=tolerance, atol=0)
    assert_close_gradients(found[1], plain[1], 10 * tolerance)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dropped_rows_and_their_gradients_ride_along_untouched(mode, layout):
    """Identity 2: the residual stream at a dropped token, and the gradient that comes back along it."""
    model, inputs, seen = llama(), batch(layout), []

    def watch(layer, args, output):
        args[0].retain_grad(), output.retain_grad()
        seen.append((args[0], output))

    hooks = [layer.register_forward_hook(watch) for layer in layers_of(model)]
    with attach(model, lemo=lemo(mode=mode, rescore=1, score="random", loss="all")) as handle:
        model(**inputs).loss.backward()
        rows = kept_rows(handle)
    for hook in hooks:
        hook.remove()
    for (before, after), own in zip(seen, rows.values(), strict=True):
        kept = kept_tokens(own, before.shape[1])
        assert kept.any() and not kept.all()
        assert torch.equal(before[~kept], after[~kept]) == (mode == "elide")
        assert torch.equal(before.grad[~kept], after.grad[~kept]) and after.grad[~kept].any()
        assert not (before[kept] == after[kept]).any(-1).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("score", ["random", "pooled", "oracle"])
def test_a_token_comes_back_as_its_residual_stream_says(mode, layout, score):
    """Identity 7: layers choose anew, so that a token that one has dropped is computed by the next."""
    model, inputs = llama(torch.float32), batch(layout)
    found = lemo_step(model, inputs, rescore=1, score=score, mode=mode, loss="all")
    rows = found[3]
    kept = [kept_tokens(own, inputs["input_ids"].shape[1]) for own in rows.values()]
    if score == "random":
        assert all((~low & high).any() for low, high in zip(kept, kept[1:], strict=False))
    model.zero_grad()
    loss = naive_lemo(model, rows, inputs, mode).loss
    loss.backward()
    torch.testing.assert_close(found[0], loss, rtol=ROUNDED, atol=0)
    assert_close_gradients(found[1], {name: p.grad for name, p in model.named_parameters()}, 10 * ROUNDED)


def test_kept_tokens_have_the_positions_they_had():
    """Identity 4: layers that keep the same tokens are the plain model on them, at their own positions."""
    model, inputs = llama(), batch(n=40)
    with attach(model, lemo=lemo(**BY_PLACE)) as handle:
        logits = model(**inputs).logits
        own = kept_rows(handle)
    rows = own[0]
    assert all(torch.equal(kept, rows) for kept in own.values()) and (rows.diff() > 1).any()
    short = {"input_ids": inputs["input_ids"].gather(1, rows), "attention_mask": torch.ones_like(rows)}
    found = logits.gather(1, rows[:, :, None].expand(-1, -1, logits.shape[2]))
    torch.testing.assert_close(found, model(**short, position_ids=rows).logits, rtol=EXACT, atol=EXACT)
    closed_up = model(**short, position_ids=torch.arange(rows.shape[1])[None]).logits
    assert (found - closed_up).abs().max() > 1e-3


def test_only_distances_between_positions_matter():
    """Identity 4."""
    model, inputs = llama(), batch("whole", n=40)
    positions = torch.arange(40)[None].expand(2, -1)
    losses = [lemo_step(model, {**inputs, "position_ids": positions + start}, rope=True)[0] for start in (0, 100)]
    torch.testing.assert_close(*losses, rtol=1e-10, atol=0)


@pytest.mark.parametrize("score", ["pooled", "oracle", "recency"])
@pytest.mark.parametrize("layout", ["left", "right"])
@pytest.mark.parametrize("mode", MODES)
def test_sequences_of_a_batch_are_as_if_alone(score, layout, mode):
    """Identity 6: they differ in length, in padding and in what they keep."""
    model, inputs = llama(), batch(layout, batch=3)
    fields = {"score": score, "mode": mode, "rescore": 2, "loss": "all"}
    with attach(model, lemo=lemo(**fields)) as handle:
        together = model(**inputs).logits
        rows = kept_rows(handle)
        assert len({tuple(kept.tolist()) for kept in rows[0]}) == 3
        for index, real in enumerate(inputs["attention_mask"].bool()):
            alone = {name: value[index : index + 1, real] for name, value in inputs.items()}
            logits = model(**alone).logits[0]
            own = kept_rows(handle)
            torch.testing.assert_close(together[index, real], logits, rtol=1e-11, atol=1e-11)
            for layer, kept in own.items():
                assert torch.equal(
                    kept_tokens(kept, len(real))[0, : real.sum()], kept_tokens(rows[layer], len(real))[index, real]
                )


@pytest.mark.parametrize("mode", MODES)
def test_packed_documents_never_mix(mode):
    """Identity 6."""
    model, inputs = llama(), batch("packed")
    second = inputs["position_ids"][0].diff().lt(0).nonzero().item() + 1
    changed = inputs["input_ids"].clone()
    changed[:, : second - 1] = changed[:, : second - 1].flip(1)
    with attach(model, lemo=lemo(mode=mode, loss="all", **BY_PLACE)) as handle:
        before = model(**inputs).logits
        rows = kept_rows(handle)[0]
        after = model(**{**inputs, "input_ids": changed}).logits
    assert ((rows >= 0) & (rows < second)).any() and (rows > second).any()
    assert torch.equal(before[:, second:], after[:, second:])
    assert not torch.equal(before[:, :second], after[:, :second])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fields", [{}, {"score": "random", "rescore": 1}, {"keep": 0.2, "score": "oracle"}], ids=str)
@pytest.mark.parametrize("layout", ["whole", "packed"])
def test_detached_tokens_leave_the_loss_as_it_is_to_the_bit(dtype, fields, layout):
    """Identity 25."""
    model, inputs = llama(dtype), batch(layout)
    plain = model(**inputs)
    with attach(model, lemo=lemo(mode="detach", **fields)):
        found = model(**inputs)
    assert torch.equal(found.logits, plain.logits) and torch.equal(found.loss, plain.loss)
