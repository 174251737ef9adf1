import pytest
import torch
from torch import nn

from hf_tokenseek import SeekConfig, attach
from hf_tokenseek.seek.probe import compare_gradients

N = 30


def make_inputs(labelled=6):
    ids = torch.randint(1, 128, (2, N), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(N) < N - labelled, -100)}


def probe(model, inputs, **options):
    with attach(model, seek=SeekConfig(probe_steps=1, **options)) as handle:
        model(**inputs)
        return handle.seek.metrics.read()


def test_everything_selected_agrees_with_the_full_gradient(tiny_llama):
    found = probe(tiny_llama(), make_inputs(), context=1.0, plain_fallback=False)
    assert found["seek/gradient_cosine"] == pytest.approx(1, abs=1e-6)
    assert found["seek/gradient_norm_ratio"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("options", [{}, {"ratio": 0.2, "score": "random"}], ids=str)
def test_equals_the_two_gradients_by_hand(tiny_llama, options):
    inputs = make_inputs()
    found = probe(tiny_llama(), inputs, **options)
    sides = []
    for attached in (False, True):
        model = tiny_llama()
        if attached:
            with attach(model, seek=SeekConfig(**options)):
                model(**inputs).loss.backward()
        else:
            model(**inputs).loss.backward()
        sides.append(torch.cat([p.grad.flatten() for p in model.parameters()]).double())
    full, selected = sides
    cosine = torch.cosine_similarity(full, selected, dim=0).item()
    assert found["seek/gradient_cosine"] == pytest.approx(cosine, abs=1e-5)
    assert found["seek/gradient_norm_ratio"] == pytest.approx((selected.norm() / full.norm()).item(), rel=1e-5)
    assert cosine < 0.999


@pytest.mark.parametrize("options", [{}, {"score": "random", "temperature": 1.0, "labelled": 0.5}], ids=str)
def test_training_goes_on_as_if_nobody_had_looked(tiny_llama, options):
    """`.grad`, the random state, the selection and the loss are those of a run without the probe."""
    inputs, results = make_inputs(), []
    for steps in (0, 1):
        model = tiny_llama()
        with attach(model, seek=SeekConfig(probe_steps=steps, **options)) as handle:
            model(**inputs).loss.backward()
            before = [p.grad.clone() for p in model.parameters()]
            torch.manual_seed(1)
            handle.seek.begin_step(1)
            loss = model(**inputs).loss
            assert all(torch.equal(p.grad, b) for p, b in zip(model.parameters(), before, strict=True))
            results.append((loss.detach(), handle.selection, torch.rand(3)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_only_the_first_micro_batch_of_every_so_many_steps(tiny_llama):
    model, probed = tiny_llama(), []
    with attach(model, seek=SeekConfig(probe_steps=2)) as handle:
        for step in range(5):
            handle.seek.begin_step(step)
            for micro in range(2):
                model(**make_inputs())
                probed += [(step, micro)] if "seek/gradient_cosine" in handle.seek.metrics.read() else []
    assert probed == [(0, 0), (2, 0), (4, 0)]


def test_without_labels_there_is_nothing_to_compare(tiny_llama):
    inputs = make_inputs()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    assert "seek/gradient_cosine" not in probe(tiny_llama(), inputs)


def test_a_parameter_that_only_one_of_the_two_reaches_counts():
    """Full gradient (3, 4), selected (3, none): cosine 3/5, not 1."""
    model = nn.ParameterList([torch.zeros(()), torch.zeros(())])
    found = compare_gradients(model, lambda plainly: 3 * model[0] + (4 * model[1] if plainly else 0))
    assert found == {"gradient_cosine": pytest.approx(0.6), "gradient_norm_ratio": pytest.approx(0.6)}


def checkpointed(model, reentrant):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model


def test_with_gradient_checkpointing(tiny_llama):
    found, plain = (probe(m, make_inputs()) for m in (checkpointed(tiny_llama(), False), tiny_llama()))
    assert found["seek/gradient_cosine"] == pytest.approx(plain["seek/gradient_cosine"], abs=1e-5)


def test_reentrant_checkpointing_is_refused_with_the_next_step(tiny_llama):
    with pytest.raises(ValueError, match=r"reentrant.*'use_reentrant': False.*probe_steps=0"):
        probe(checkpointed(tiny_llama(), True), make_inputs())
