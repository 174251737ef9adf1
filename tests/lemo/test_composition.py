"""
LeMo together with everything else.

Where all layers keep the same tokens, a step with LeMo is the same step on a batch of these tokens alone, at the
positions that they had: whatever else is attached can be compared with itself.
"""

from contextlib import nullcontext

import pytest
import torch
from peft import get_peft_model

from hf_tokenseek import attach
from tests.ist.tiny_ist import layers_of, set_active, step
from tests.lemo.deep_lemo import (
    ALL_KEPT,
    assert_close_gradients,
    assert_same_gradients,
    batch,
    computed_tokens,
    kept_rows,
    lemo_step,
    llama,
    windowed,
)
from tests.lemo.naive import kept_tokens, naive_lemo
from tests.lemo.test_loss import reference
from tests.lemo.tiny_lemo import VELORA, lemo
from tests.peft.test_quantised_base import build, folder  # noqa: F401
from tests.peft.tiny_peft import LORA_VARIANTS, adapted, lora
from tests.seek.naive import detached_rows

N, ANSWER = 40, 4
# the first block and the last ones
BY_PLACE = {"score": "recency"}
IST = {"policy": "random"}
METHODS = {
    "alone": {},
    "lean": {"lean": True},
    "velora": {"velora": VELORA},
    "ist": {"ist": IST},
    "all": {"lean": True, "velora": VELORA, "ist": IST},
}
KINDS = {
    "full": llama,
    "lora": lambda: get_peft_model(llama(), lora(target_modules="all-linear")),
    "dora": lambda: get_peft_model(llama(), lora(target_modules="all-linear", use_dora=True)),
    "dropout": lambda: get_peft_model(llama(), lora(target_modules="all-linear", lora_dropout=0.3)),
}
# sums in another order, in float64; the stock loss is computed in float32
EXACT, ROUNDED = 1e-10, 128 * 2**-24


def answers(batch_size: int = 2) -> dict:
    """Sequences of which the last block are labels."""
    inputs = batch(n=N, batch=batch_size)
    return {**inputs, "labels": inputs["input_ids"].masked_fill(torch.arange(N) < N - ANSWER, -100)}


def of_kept(inputs: dict, rows: torch.Tensor) -> dict:
    """The kept tokens alone; the mask keeps the gaps between positions from being read as limits of documents."""
    ids, labels = (inputs[name].gather(1, rows) for name in ("input_ids", "labels"))
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(rows), "position_ids": rows}


def run(model, inputs: dict, methods: dict, seed: int = 0):
    """A step with these methods; of sparse tuning two layers train."""
    with attach(model, **methods) if methods else nullcontext() as handle:
        if "ist" in methods:
            set_active(handle.ist, [1, 3])
        torch.manual_seed(seed)
        found = step(model, inputs)
        rows = None if "lemo" not in methods else [kept.rows for kept in handle.lemo.elimination.kept.values()]
    return found, rows


def assert_step_of_kept_tokens(make, methods: dict, others: dict | None = None, tolerance: float = EXACT, **fields):
    """With LeMo and `methods`, as with `others` on the kept tokens."""
    inputs = answers()
    found, rows = run(make(), inputs, {**methods, "lemo": lemo(**{**BY_PLACE, **fields})})
    assert all(torch.equal(own, rows[0]) for own in rows) and rows[0].shape[1] == N // 2
    expected, _ = run(make(), of_kept(inputs, rows[0]), methods if others is None else others)
    torch.testing.assert_close(found[0], expected[0], rtol=max(tolerance, 2**-23), atol=0)
    assert_close_gradients(found[1], expected[1], tolerance)


@pytest.mark.parametrize("methods", METHODS.values(), ids=METHODS.keys())
@pytest.mark.parametrize("kind", KINDS)
def test_keeping_everything_is_each_method_alone_to_the_bit(kind, methods):
    (loss, gradients, mib), _ = run(KINDS[kind](), answers(), {**methods, "lemo": lemo(keep=1.0)})
    expected, _ = run(KINDS[kind](), answers(), methods)
    assert torch.equal(loss, expected[0]) and mib == expected[2]
    assert_same_gradients(gradients, expected[1])


@pytest.mark.parametrize("methods", METHODS.values(), ids=METHODS.keys())
@pytest.mark.parametrize("kind", KINDS)
def test_is_each_method_on_the_kept_tokens(kind, methods):
    assert_step_of_kept_tokens(KINDS[kind], methods)


@pytest.mark.parametrize("score", ["pooled", "oracle", "random"])
def test_scoring_draws_no_random_numbers(score):
    """All tokens are kept, so that dropout meets the tensors of the plain model, in the same order."""
    inputs, fields = answers(), {**ALL_KEPT, "score": score, "rescore": 1}
    found, _ = run(KINDS["dropout"](), inputs, {"lemo": lemo(**fields)})
    expected, _ = run(KINDS["dropout"](), inputs, {})
    torch.testing.assert_close(found[0], expected[0], rtol=2**-23, atol=0)
    assert_close_gradients(found[1], expected[1], EXACT)


def seek(context: float, **fields) -> dict:
    return {"context": context, "plain_fallback": False, **fields}


@pytest.mark.parametrize("methods", METHODS.values(), ids=METHODS.keys())
@pytest.mark.parametrize("kind", KINDS)
def test_with_seek_it_selects_among_the_kept_tokens(kind, methods):
    # six rows of evidence, of all and of kept tokens
    whole, kept = ({**methods, "seek": seek(6 / (n - ANSWER))} for n in (N, N // 2))
    assert_step_of_kept_tokens(KINDS[kind], whole, kept)


@pytest.mark.parametrize("score", ["context", "recent"])
def test_with_any_score_of_seek(score):
    whole, kept = ({"seek": seek(6 / (n - ANSWER), score=score)} for n in (N, N // 2))
    assert_step_of_kept_tokens(llama, whole, kept)


@pytest.mark.parametrize("score", ["gradient", "loss"])
def test_with_scores_of_labels(score):
    assert_step_of_kept_tokens(llama, {"seek": seek(0.0, labelled=0.5, score=score)})


@pytest.mark.parametrize("layout", ["whole", "left", "right", "packed"])
@pytest.mark.parametrize("mlp", ["tokens", "dense"])
@pytest.mark.parametrize("make", [llama, windowed])
def test_with_seek_everything_selected_is_lemo_alone(make, layout, mlp):
    inputs, fields = batch(layout), {"mlp": mlp}
    alone = lemo_step(make(), inputs, **fields)
    with attach(model := make(), seek=seek(1.0), lemo=lemo(**fields)) as handle:
        found = step(model, inputs)
        chosen = handle.selection
    for own, rows in zip(chosen, alone[3][0], strict=True):
        assert torch.equal(own[own >= 0], rows[rows >= 0])
    torch.testing.assert_close(found[0].to(alone[0].dtype), alone[0], rtol=ROUNDED, atol=0)
    assert_close_gradients(found[1], alone[1], ROUNDED)


@pytest.mark.parametrize("layout", ["whole", "left", "right", "packed"])
@pytest.mark.parametrize(
    "fields",
    [{"dense_first": 1, "dense_last": 1}, {"score": "random", "rescore": 1, "keep": 0.7}, {"mlp": "dense"}],
    ids=str,
)
@pytest.mark.parametrize("context", [0.3, 1.0])
@pytest.mark.parametrize("make", [llama, windowed])
def test_with_seek_it_is_the_plain_model_whose_other_rows_are_detached(make, layout, fields, context):
    """Also where layers keep different tokens: none is trained that one of them has dropped."""
    model, inputs = make(torch.float32), batch(layout)
    with attach(model, seek=seek(context), lemo=lemo(**fields)) as handle:
        found = step(model, inputs)
        rows, chosen = kept_rows(handle), kept_tokens(handle.selection, 42)
    computed = computed_tokens(rows, 42)
    assert torch.equal(chosen, computed) if context == 1 else (chosen <= computed).all()
    model.zero_grad()
    with detached_rows(model, chosen):
        output = naive_lemo(model, rows, inputs, mlp=fields.get("mlp", "tokens"), attention="naive_detach")
    loss, kept, _ = reference(output.logits, inputs["labels"], chosen)
    (loss / kept).backward()
    torch.testing.assert_close(found[0], (loss / kept).detach(), rtol=ROUNDED, atol=0)
    assert_close_gradients(found[1], {name: p.grad for name, p in model.named_parameters()}, 10 * ROUNDED)


def test_a_micro_batch_that_does_not_pay_is_trained_plainly():
    inputs = batch("right")
    alone = lemo_step(llama(), inputs)
    model = llama()
    with attach(model, seek={"context": 1.0}, lemo=lemo()) as handle:
        found = step(model, inputs)
        assert handle.seek.metrics.read()["seek/plain_share"] == 1
    torch.testing.assert_close(found[0].to(alone[0].dtype), alone[0], rtol=ROUNDED, atol=0)
    assert_close_gradients(found[1], alone[1], ROUNDED)


def test_scouting_runs_on_the_kept_rows_and_training_on_the_selected_ones():
    model, seen = llama(), []
    for layer in layers_of(model):
        layer.self_attn.k_proj.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    with attach(model, seek=seek(6 / (N - ANSWER)), lemo=lemo(dense_first=1, dense_last=1, **BY_PLACE)):
        step(model, answers())
    assert seen == [N, N // 2, N // 2, N] + 4 * [6 + ANSWER]


@pytest.mark.parametrize("layout", ["whole", "left", "packed"])
def test_windows_give_kept_tokens_the_attention_that_they_give_all(layout):
    """Where all tokens are kept, the same evidence is found as without LeMo."""
    found = []
    for own in ({}, {"lemo": lemo(**ALL_KEPT)}):
        with attach(model := windowed(), seek=seek(0.3), **own) as handle:
            step(model, batch(layout))
            found.append(handle.selection)
    assert torch.equal(*found)


@pytest.mark.parametrize("fields", [{}, {"mlp": "dense"}, {"rescore": 1, "score": "random"}], ids=str)
def test_seek_may_be_undone_before_lemo_and_lemo_before_seek(fields):
    inputs, selecting = answers(), {"seek": seek(0.3)}
    alone, plain = lemo_step(llama(), inputs, **fields), run(llama(), inputs, selecting)[0]
    for leaving, expected in (("seek", alone), ("lemo", plain)):
        model = llama()
        handles = {"seek": attach(model, **selecting), "lemo": attach(model, lemo=lemo(**fields))}
        handles.pop(leaving).undo()
        found = step(model, inputs)
        assert torch.equal(found[0], expected[0])
        assert_same_gradients(found[1], expected[1])


def test_seek_attached_behind_lemo_is_refused_when_it_trains():
    model = llama()
    with (
        attach(model, lemo=lemo()),
        attach(model, seek=True),
        pytest.raises(ValueError, match="about to train without LeMo.*attach TokenSeek first"),
    ):
        model(**answers())


@pytest.mark.parametrize("mode", ["elide", "detach"])
def test_autocast(mode):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inputs, make = answers(), lambda: llama(torch.float32)
        plain, dense = step(make(), inputs), lemo_step(make(), inputs, keep=1.0, mode=mode)
        assert torch.equal(plain[0], dense[0])
        assert_same_gradients(dense[1], plain[1])
        if mode == "detach":
            assert torch.equal(lemo_step(make(), inputs, mode=mode)[0], plain[0])
        else:
            # the head is given another number of rows
            assert_step_of_kept_tokens(make, {}, tolerance=2**-7)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_quantised_base(build, checkpointing):  # noqa: F811
    model = build(checkpointing, target_modules="all-linear")
    assert_step_of_kept_tokens(lambda: model, {}, tolerance=2e-5)
    whole, kept = ({"seek": seek(6 / (n - ANSWER)), "lean": True} for n in (N, N // 2))
    assert_step_of_kept_tokens(lambda: model, whole, kept, tolerance=2e-5)


@pytest.mark.parametrize("how", ["lora-embeddings", "lora-head-saved", "lora-norms-saved", "lora-new-tokens"])
def test_other_adapters(how):
    assert_step_of_kept_tokens(lambda: adapted(llama(), LORA_VARIANTS[how]()), {})
