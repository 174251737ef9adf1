from dataclasses import replace

import pytest

from hf_tokenseek import SeekConfig, attach
from hf_tokenseek.memory import Training, affordable_ratio, budget, estimate
from hf_tokenseek.memory.budget import RATIOS
from hf_tokenseek.memory.run import longest_sequence
from tests.seek.tiny_families import tiny_config

LONG = Training(seq=256, batch=2, labelled=1.0, dtype="fp32", device="cpu")


@pytest.fixture(params=[False, True], ids=["stored", "checkpointing"])
def case(request, monkeypatch):
    """A config, a training, and the peaks of all ratios, each simulated once."""
    config = tiny_config("llama")
    config.use_cache = False
    training, known = replace(LONG, checkpointing=request.param), {}

    def known_estimate(config, training):
        ratio = training.methods["seek"]["ratio"]
        if ratio not in known:
            known[ratio] = estimate(config, training)
        return known[ratio]

    monkeypatch.setattr(budget, "estimate", known_estimate)
    sizes = {
        ratio: known_estimate(config, replace(training, methods={"seek": {"ratio": ratio}})).peak.bytes
        for ratio in (*RATIOS, 1.0)
    }
    return config, training, sizes


def test_the_largest_ratio_that_fits_is_found(case):
    config, training, sizes = case
    assert len(set(sizes.values())) > 2
    for size in sorted(sizes.values()):
        for budget_bytes in (size, size - 1):
            fitting = [ratio for ratio, bytes in sizes.items() if bytes <= budget_bytes]
            if fitting:
                assert affordable_ratio(config, training, budget_bytes) == max(fitting)
            else:
                with pytest.raises(ValueError, match=r"2 x 256 tokens take .* smallest ratio, 0.05"):
                    affordable_ratio(config, training, budget_bytes)


def test_other_methods_are_simulated_with_it(case):
    config, training, _ = case
    seen = []

    def watched(config, training):
        seen.append(training.methods)
        return estimate(config, training)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget, "estimate", watched)
        wanted = replace(training, methods={"lean": True, "seek": {"score": "recent"}})
        assert affordable_ratio(config, wanted, 2**40) == 1.0
    assert seen == [{"lean": True, "seek": {"score": "recent", "ratio": 1.0}}]


def test_the_longest_sequence_is_read_or_said():
    rows = [{"input_ids": [1] * length} for length in (3, 9, 5)]
    assert longest_sequence(rows, None) == 9
    assert longest_sequence(rows, 20) == 9
    assert longest_sequence(rows, 4) == 4
    assert longest_sequence([{"text": "a"}], 7) == 7
    assert longest_sequence(iter(rows), 7) == 7
    for unknown in ([{"text": "a"}], iter(rows), []):
        with pytest.raises(ValueError, match="no `input_ids`"):
            longest_sequence(unknown, None)


def test_a_plain_loop_cannot_ask_for_it(tiny_llama):
    with pytest.raises(ValueError, match="affordable_ratio"):
        attach(tiny_llama(), seek=SeekConfig(ratio="auto"))
