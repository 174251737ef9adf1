"""A share of blocks for each layer, at which all of them lose the same."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_tokenseek import attach
from hf_tokenseek.lemo import calibrate
from hf_tokenseek.lemo.calibration import equal_loss, lost_shares
from hf_tokenseek.lemo.recording import oracle_scores, recording
from tests.lemo.tiny_lemo import lemo, make_inputs


def lost_by_hand(scores: list[float], share: float) -> float:
    """What is lost if a share of the blocks is kept, of which the last one counts by its part."""
    best, kept = sorted(scores, reverse=True), share * len(scores)
    found = sum(min(1.0, max(0.0, kept - place)) * score for place, score in enumerate(best))
    return 1 - found / sum(scores)


def lost_at(curve: torch.Tensor, share: float) -> float:
    """A curve's value between its points."""
    place = share * (len(curve) - 1)
    low = min(int(place), len(curve) - 2)
    return torch.lerp(curve[low], curve[low + 1], place - low).item()


def test_lost_shares_equal_a_loop():
    scores = torch.rand(3, 9, generator=torch.Generator().manual_seed(0))
    exists = torch.arange(9) < torch.tensor([[9], [5], [1]])
    curve = lost_shares(scores, exists)
    for place, lost in enumerate(curve.tolist()):
        share = place / (len(curve) - 1)
        own = [lost_by_hand(row[there].tolist(), share) for row, there in zip(scores, exists, strict=True)]
        assert lost == pytest.approx(sum(own) / 3, abs=1e-6)
    assert curve[0] == 1 and curve[-1].abs() < 1e-12


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.floats(0.01, 100), min_size=4, max_size=40), min_size=1, max_size=6),
    st.floats(0.05, 0.95),
)
def test_all_layers_lose_the_same(layers, mean):
    curves = torch.stack([lost_shares(torch.tensor([own]), torch.ones(1, len(own)) > 0) for own in layers])
    shares = equal_loss(curves, mean)
    assert sum(shares) / len(shares) == pytest.approx(mean, rel=1e-9)
    assert all(0 < share <= 1 for share in shares)
    lost = [lost_at(curve, share) for curve, share in zip(curves, shares, strict=True)]
    # a layer keeps a thousandth at least, and loses no more than it would with nothing
    free = [value for value, share in zip(lost, shares, strict=True) if share > 2e-3]
    assert max(free) - min(free) < 1e-6
    assert max(lost) <= max(free) + 1e-6


def test_uneven_scores_need_fewer_blocks():
    even, uneven = torch.ones(1, 20), torch.ones(1, 20)
    uneven[0, 3] = 100
    curves = torch.stack([lost_shares(own, torch.ones(1, 20) > 0) for own in (even, uneven)])
    of_even, of_uneven = equal_loss(curves, 0.4)
    assert of_uneven < 0.1 < 0.7 < of_even


def test_where_nothing_is_left_to_lose_the_rest_is_shared_out():
    """Half of the blocks have the whole score: to keep more than them loses nothing."""
    scores = torch.tensor([[1.0] * 10 + [0.0] * 10])
    curves = torch.stack([lost_shares(own, torch.ones(1, 20) > 0) for own in (scores, torch.ones(1, 20))])
    shares = equal_loss(curves, 0.9)
    assert sum(shares) / 2 == pytest.approx(0.9) and all(share <= 1 for share in shares)
    assert [lost_at(curve, share) for curve, share in zip(curves, shares, strict=True)] == pytest.approx(
        [0, 0], abs=1e-6
    )


def test_a_model_is_calibrated_and_runs(tiny_llama):
    model = tiny_llama()
    batches = [make_inputs("right", n=82, seed=seed) for seed in range(3)]
    for inputs in batches:
        inputs["input_ids"] %= 128
        inputs["labels"] = inputs["labels"].where(inputs["labels"] < 0, inputs["input_ids"])
    config = lemo(keep=0.4, dense_first=1, score="oracle", rescore=1, sinks=0, recent=1, labelled=False)
    found = calibrate(model, batches, config, progress=False)
    assert found.keep[0] == 1.0 and sum(found.keep[1:]) / 2 == pytest.approx(0.4)
    # on what it was calibrated with, the layers lose the same
    with recording(model):
        seen = [oracle_scores(model, inputs, config) for inputs in batches]
    for layers in zip(*(scores[1:] for scores, _ in seen), strict=True):
        assert len(layers) == 3
    curves = [
        torch.stack([lost_shares(scores[layer], blocks.exists) for scores, blocks in seen]).mean(0) for layer in (1, 2)
    ]
    lost = [lost_at(curve, share) for curve, share in zip(curves, found.keep[1:], strict=True)]
    assert lost[0] == pytest.approx(lost[1], abs=1e-6)

    with attach(model, lemo=found) as handle:
        model(**batches[0]).loss.backward()
        kept = handle.lemo.elimination.kept
        counts = handle.lemo.elimination.blocks.counts
    assert set(kept) == {1, 2}
    for layer, own in kept.items():
        expected = [max(1, int(found.keep[layer] * count + 1e-9)) for count in counts]
        assert (own.blocks >= 0).sum(1).tolist() == expected


def test_the_model_is_given_back(tiny_llama):
    model = tiny_llama()
    before = model.config._attn_implementation, [module.training for module in model.modules()]
    calibrate(model, [make_inputs("whole", n=40) | {"input_ids": torch.ones(2, 40, dtype=torch.long)}], lemo(), False)
    assert before == (model.config._attn_implementation, [module.training for module in model.modules()])
    assert all("forward" not in vars(module) for module in model.modules())


def test_what_cannot_be_calibrated_is_refused(tiny_llama):
    with pytest.raises(ValueError, match=r"spreads one share over the layers, got keep=\[0.4, 0.4, 0.4\]"):
        calibrate(tiny_llama(), [], lemo(keep=[0.4] * 3))
    with pytest.raises(ValueError, match="keep=1, with which no layer drops anything"):
        calibrate(tiny_llama(), [], lemo(keep=1.0))
    with pytest.raises(ValueError, match="got no batches. Pass some"):
        calibrate(tiny_llama(), [], lemo(), progress=False)
