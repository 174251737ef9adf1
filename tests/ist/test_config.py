"""`IstConfig`: what is allowed, and what is said about the rest."""

import pytest

from hf_tokenseek import IstConfig, TokenSeekArguments


def test_defaults():
    config = IstConfig()
    assert (config.layers, config.policy, config.period, config.state) == (0.25, "ist", 20, "free")
    assert config.rate == 0.15 and IstConfig(reward="exp").rate == 10.0


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"layers": 0}, r"`layers` should be a share in \(0, 1\], got 0"),
        ({"layers": 8}, r"in \(0, 1\], got 8"),
        ({"layers": True}, "`layers` should be a number"),
        ({"policy": "rst"}, "`policy` should be one of .*'random'"),
        ({"state": "drop"}, "`state` should be one of"),
        ({"reward": "loss"}, "`reward` should be one of"),
        ({"period": 0}, "`period` should be at least 1"),
        ({"period": 2.5}, "whole number"),
        ({"score_steps": 0}, "at least 1"),
        ({"candidates": 1}, "at least 2"),
        ({"suppressed": 1.0}, r"in \(0, 1\), got 1.0"),
        ({"beta": 1.0}, "suppresses nothing"),
        ({"rate": 0}, "`rate` should be above 0"),
        ({"lowest": 0.9}, r"in \[0, 1 - layers\] = \[0, 0.75\], got 0.9"),
        ({"antithetic": True, "candidates": 3}, "even number of `candidates`"),
        ({"antithetic": True, "suppressed": 0.3}, "suppressed=0.5"),
        ({"unbiased": True, "policy": "top"}, "got policy='top'"),
    ],
)
def test_what_is_outside_is_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        IstConfig(**fields)


def test_arguments_take_it_in_every_form(tmp_path):
    expected = IstConfig(layers=0.5, policy="random")
    for value in (expected, {"layers": 0.5, "policy": "random"}, '{"layers": 0.5, "policy": "random"}'):
        args = TokenSeekArguments(output_dir=str(tmp_path), ist=value)
        assert args.ist == expected and args.to_dict()["ist"]["layers"] == 0.5
    assert TokenSeekArguments(output_dir=str(tmp_path)).ist is None
    with pytest.raises(ValueError, match="`ist` has unknown fields"):
        TokenSeekArguments(output_dir=str(tmp_path), ist={"layer": 0.5})
