"""The search for thresholds: against the slope, reproducible, and never begun twice."""

import json

import pytest
import torch

from hf_tokenseek import attach
from hf_tokenseek.lemo import search_thresholds, thresholds
from tests.lemo.tiny_lemo import lemo, make_inputs

LAYERS = 3


@pytest.fixture
def held_out():
    """Two micro-batches."""
    batches = [make_inputs("right", n=82, seed=seed) for seed in range(2)]
    for inputs in batches:
        inputs["input_ids"] %= 128
        inputs["labels"] = inputs["labels"].where(inputs["labels"] < 0, inputs["input_ids"])
    return batches


def config(**fields):
    return lemo(score="oracle", rescore=1, bounds=[0.1, 0.9], labelled=False, **fields)


def evaluations(record) -> list[dict]:
    """What a search has measured so far."""
    return json.loads(record.read_text())["evaluations"]


class StubbedLoss:
    """A loss of the thresholds whose slope is known: the sum of `slopes * thresholds`."""

    def __init__(self, slopes):
        self.slopes, self.asked = slopes, []

    def __call__(self, model, batches, config, tried):
        self.asked.append(tried)
        return sum(slope * own for slope, own in zip(self.slopes, tried, strict=True))


@pytest.fixture
def stubbed(monkeypatch):
    """Puts a stubbed loss in the place of the model's."""

    def build(*slopes):
        loss = StubbedLoss(slopes)
        monkeypatch.setattr(thresholds, "_loss", loss)
        return loss

    return build


def test_thresholds_move_against_the_slope(tiny_llama, held_out, stubbed, tmp_path):
    loss = stubbed(0.5, -0.25, 0.0)
    found = search_thresholds(
        tiny_llama(), held_out, config(), tmp_path / "record.json", step=0.1, rate=2.0, progress=False
    )
    assert found.thresholds == pytest.approx([1 - 2.0 * 0.5, 1 + 2.0 * 0.25, 1.0])
    # two a layer, each from where the layers below have come to
    expected = [[1.1, 1, 1], [0.9, 1, 1], [0, 1.1, 1], [0, 0.9, 1], [0, 1.5, 1.1], [0, 1.5, 0.9]]
    assert [pytest.approx(own) for own in expected] == loss.asked
    assert config(thresholds=found.thresholds) == found


def test_thresholds_stay_at_least_zero_and_slopes_are_true_there(tiny_llama, held_out, stubbed, tmp_path):
    stubbed(3.0, 0.0, 0.0)
    options = {"step": 0.5, "rate": 0.3, "passes": 3, "progress": False}
    found = search_thresholds(tiny_llama(), held_out, config(), tmp_path / "record.json", **options)
    # 1, 0.1 and there only half a step down to 0
    assert found.thresholds == pytest.approx([0.0, 1.0, 1.0])
    stubbed(0.5, 0.0, 0.0)
    options |= {"rate": 1.6, "passes": 2}
    found = search_thresholds(tiny_llama(), held_out, config(), tmp_path / "other.json", **options)
    # 1 - 0.8 = 0.2, where the evaluations are 0.7 and 0: a slope of 0.5 still
    expected = [{"layer": 0, "threshold": 0.7, "loss": 0.35}, {"layer": 0, "threshold": 0.0, "loss": 0.0}]
    assert evaluations(tmp_path / "other.json")[6:8] == [pytest.approx(own) for own in expected]
    assert found.thresholds == pytest.approx([0.0, 1.0, 1.0])


def test_only_layers_that_drop_tokens_are_visited(tiny_llama, held_out, stubbed, tmp_path):
    loss = stubbed(1.0, 1.0, 1.0)
    own = config(dense_first=1, dense_last=1)
    found = search_thresholds(tiny_llama(), held_out, own, tmp_path / "record.json", rate=0.5, progress=False)
    assert found.thresholds == pytest.approx([1.0, 0.5, 1.0]) and len(loss.asked) == 2


def test_a_search_is_reproducible_and_its_result_runs(tiny_llama, held_out, tmp_path):
    model = tiny_llama()
    options = {"step": 0.4, "rate": 50.0, "progress": False}
    first, second = (
        search_thresholds(model, held_out, config(), tmp_path / name / "record.json", **options) for name in "ab"
    )
    assert first == second and first.thresholds != [1.0] * LAYERS
    assert len(evaluations(tmp_path / "a" / "record.json")) == 2 * LAYERS
    # the model is given back, training as it was
    assert model.training and all("forward" not in vars(module) for module in model.modules())
    with attach(model, lemo=first) as handle:
        loss = model(**held_out[0]).loss
        loss.backward()
        assert set(handle.lemo.elimination.kept) == {0, 1, 2}


def test_losses_are_those_of_all_labels_in_evaluation(tiny_llama, held_out, tmp_path):
    model = tiny_llama()
    search_thresholds(model, held_out, config(), tmp_path / "record.json", step=0.4, progress=False)
    found = evaluations(tmp_path / "record.json")[0]["loss"]
    own = config(thresholds=[1.4, 1.0, 1.0], loss="all")
    model.eval()
    with attach(model, lemo=own) as handle, handle.lemo.everywhere(), torch.no_grad():
        logits = [model(**{**inputs, "labels": None}).logits for inputs in held_out]
    expected = [
        torch.nn.functional.cross_entropy(own[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()).item()
        for own, inputs in zip(logits, held_out, strict=True)
    ]
    assert found == pytest.approx(sum(expected) / 2, rel=1e-5)


class Interrupted(Exception):
    """The process has ended here."""


def test_an_interrupted_search_goes_on(tiny_llama, held_out, tmp_path, monkeypatch):
    model, loss, asked = tiny_llama(), thresholds._loss, []
    options = {"step": 0.4, "rate": 50.0, "progress": False}
    whole = search_thresholds(model, held_out, config(), tmp_path / "whole.json", **options)

    def counted(*args):
        if len(asked) == 3:
            raise Interrupted
        asked.append(args)
        return loss(*args)

    monkeypatch.setattr(thresholds, "_loss", counted)
    with pytest.raises(Interrupted):
        search_thresholds(model, held_out, config(), tmp_path / "record.json", **options)
    assert len(evaluations(tmp_path / "record.json")) == 3
    asked.clear()
    assert search_thresholds(model, held_out, config(), tmp_path / "record.json", **options) == whole
    assert len(asked) == 3
    # and a finished one asks for nothing
    asked[:] = [None] * 3
    assert search_thresholds(model, held_out, config(), tmp_path / "record.json", **options) == whole


def test_a_tuple_is_the_list_that_it_is_on_disk(tiny_llama, held_out, stubbed, tmp_path):
    loss = stubbed(0.1, 0.1, 0.1)
    own = lemo(score="oracle", bounds=(0.1, 0.9))
    for _ in range(2):
        search_thresholds(tiny_llama(), held_out, own, tmp_path / "record.json", progress=False)
    assert len(loss.asked) == 2 * LAYERS


CHANGES = [
    {"step": 0.2},
    {"rate": 3.0},
    {"passes": 2},
    {"config": config(block=8)},
    "fewer",
    "other labels",
    "trained",
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_the_record_of_another_search_is_refused(tiny_llama, held_out, stubbed, tmp_path, change):
    stubbed(0.1, 0.1, 0.1)
    model = tiny_llama()
    options = {"held_out": held_out, "config": config(), "record": tmp_path / "record.json", "progress": False}
    search_thresholds(model, **options)
    if change == "fewer":
        change = {"held_out": held_out[:1]}
    elif change == "other labels":
        change = {"held_out": [{**inputs, "labels": inputs["labels"].roll(1, 1)} for inputs in held_out]}
    elif change == "trained":
        change = {}
        model.model.layers[1].mlp.up_proj.weight.data += 0.01
    with pytest.raises(ValueError, match="record.json is of another search: .*Name another file for `record`"):
        search_thresholds(model, **{**options, **change})


def test_what_cannot_be_searched_is_refused(tiny_llama, held_out, tmp_path):
    with pytest.raises(ValueError, match="got no held-out micro-batches"):
        search_thresholds(tiny_llama(), [], config(), tmp_path / "record.json")
    with pytest.raises(ValueError, match="`step` should be above 0, got 0"):
        search_thresholds(tiny_llama(), held_out, config(), tmp_path / "record.json", step=0)
    with pytest.raises(ValueError, match="mode='detach' is exact"):
        search_thresholds(tiny_llama(), held_out, config(mode="detach"), tmp_path / "record.json")
