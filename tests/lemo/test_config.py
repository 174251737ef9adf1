"""`LemoConfig`: what is allowed, and what is said about the rest."""

import dataclasses
import json
import re

import pytest

from hf_tokenseek import LemoConfig, TokenSeekArguments


def test_defaults():
    config = LemoConfig()
    assert (config.keep, config.block, config.score, config.queries) == (0.4, 64, "pooled", "labelled")
    assert (config.dense_first, config.dense_last, config.sinks, config.recent) == (2, 0, 1, 1)
    assert (config.loss, config.mode, config.mlp, config.thresholds) == ("kept", "elide", "tokens", None)


def test_documented_defaults_are_the_defaults():
    documented = dict(re.findall(r"^ {8}(\w+) \(.*defaults to `?(.*?)`?\):$", LemoConfig.__doc__, re.MULTILINE))
    config = LemoConfig()
    optional = {f.name for f in dataclasses.fields(LemoConfig)} - {"thresholds", "predictor"}
    assert documented.keys() == optional
    assert {name: eval(value) for name, value in documented.items()} == {n: getattr(config, n) for n in optional}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"keep": 0}, r"`keep` should be a share in \(0, 1\], got 0"),
        ({"keep": 1.5}, r"`keep` should be a share in \(0, 1\], got 1.5"),
        ({"keep": True}, "`keep` should be a share"),
        ({"keep": "0.4"}, "`keep` should be a share"),
        ({"keep": [0.4, 0]}, r"`keep` should be a share in \(0, 1\], got \[0.4, 0\]"),
        ({"block": 0}, "`block` should be at least 1, got 0"),
        ({"block": 64.0}, "`block` should be a whole number, got 64.0"),
        ({"score": "norm"}, "`score` should be one of .*'pooled', 'oracle', 'predictor'.*got 'norm'"),
        ({"rescore": -1}, "`rescore` should be at least 0, got -1"),
        ({"queries": "past"}, "`queries` should be one of .*'labelled'.*got 'past'"),
        ({"dense_first": -1}, "`dense_first` should be at least 0"),
        ({"dense_last": 0.5}, "`dense_last` should be a whole number"),
        ({"sinks": -1}, "`sinks` should be at least 0"),
        ({"recent": -1}, "`recent` should be at least 0"),
        ({"probe_steps": -1}, "`probe_steps` should be at least 0"),
        ({"seed": 0.1}, "`seed` should be a whole number"),
        ({"loss": "some"}, "`loss` should be one of .*'kept', 'all'.*got 'some'"),
        ({"mode": "drop"}, "`mode` should be one of .*'elide', 'detach'.*got 'drop'"),
        ({"mlp": "sparse"}, "`mlp` should be one of .*'tokens', 'dense', 'neurons'.*got 'sparse'"),
        ({"neurons": 0}, r"`neurons` should be a share in \(0, 1\], got 0"),
        ({"offload_gib": -1}, "`offload_gib` should be at least 0 and finite, got -1"),
        ({"offload_gib": float("inf")}, "at least 0 and finite, got inf"),
        ({"offload_gib": "8"}, "`offload_gib` should be a number, got '8'"),
        ({"bounds": [0.1]}, "`bounds` should be two shares, .*got .0.1."),
        ({"bounds": 0.5}, "`bounds` should be two shares, .*got 0.5"),
        ({"bounds": [0.6, 0.1]}, "0 < least <= largest <= 1, got .0.6, 0.1."),
        ({"bounds": [0, 0.5]}, "0 < least"),
        ({"bounds": [0.5, 1.1]}, "largest <= 1"),
        ({"thresholds": 0.5}, "`thresholds` should be a list of numbers of at least 0, got 0.5"),
        ({"thresholds": [0.5, -1]}, "of at least 0, got .0.5, -1."),
        ({"thresholds": ["a"]}, "list of numbers"),
        ({"thresholds": [1.0], "bounds": [0.1, 1.0]}, "memory for all blocks.*Set the largest share below 1"),
        ({"thresholds": [1.0], "keep": [0.5]}, "by `thresholds` or by a list in `keep`, got both. Leave one out"),
        ({"thresholds": [1.0], "score": "random"}, "score that reads the tokens, got score='random'"),
        ({"thresholds": [1.0], "score": "recency"}, "Use one of .*'pooled', 'oracle', 'predictor'"),
        ({"score": "predictor"}, "score='predictor' and predictor=None do not fit together.*train_predictor.py"),
        ({"predictor": "folder"}, "score='pooled' and predictor='folder' do not fit together"),
        ({"score": "previous_layer", "rescore": 1}, "needs rescore=0, .*got rescore=1.*or set score='pooled'"),
        ({"score": "previous_layer", "dense_first": 0}, "dense_first of at least 1.*dense_first=0"),
        ({"score": "previous_layer", "queries": "earlier"}, "no queries='earlier', got .*queries='earlier'"),
        ({"mode": "detach", "mlp": "neurons"}, "mode='detach' runs the MLP of kept tokens.*mlp='tokens' or mlp='den"),
    ],
)
def test_what_is_outside_is_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        LemoConfig(**fields)


def test_shares_of_the_layers():
    assert LemoConfig(keep=0.4, dense_first=2, dense_last=1).shares(5) == [1.0, 1.0, 0.4, 0.4, 1.0]
    assert LemoConfig(keep=[0.1, 0.2, 0.3], dense_first=1).shares(3) == [1.0, 0.2, 0.3]
    # memory follows from the most that thresholds may keep
    assert LemoConfig(thresholds=[1.0] * 3, dense_first=0, bounds=[0.2, 0.7]).shares(3) == [0.7] * 3


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"keep": [0.5] * 3}, "`keep` has 3 values, the model has 4 layers. Give one for each, or a number"),
        ({"thresholds": [0.5] * 5}, "`thresholds` has 5 values, the model has 4 layers"),
        ({"dense_first": 3, "dense_last": 1}, "dense_first=3 and dense_last=1 leave none of 4 layers"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        LemoConfig(**fields).shares(4)


def test_arguments_take_it_in_every_form(tmp_path):
    fields = {"keep": [0.5, 0.25], "score": "oracle", "bounds": [0.2, 0.3]}
    expected = LemoConfig(**fields)
    for value in (expected, fields, json.dumps(fields)):
        args = TokenSeekArguments(output_dir=str(tmp_path), lemo=value)
        assert args.lemo == expected and args.to_dict()["lemo"]["keep"] == [0.5, 0.25]
    assert TokenSeekArguments(output_dir=str(tmp_path)).lemo is None
    assert LemoConfig.parse("true") == LemoConfig.parse(True) == LemoConfig()
    assert LemoConfig.parse("off") is LemoConfig.parse(None) is LemoConfig.parse(False) is None


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"kept": 0.5}, r"`lemo` has unknown fields \['kept'\]. Allowed: \['keep', 'block'"),
        ("{keep", "`lemo` should be JSON such as '.*keep.*', true or false"),
        (0.4, "`lemo` should be a LemoConfig, dict, JSON, bool or None, got float"),
    ],
)
def test_what_cannot_be_read_is_refused(value, said):
    with pytest.raises(ValueError, match=said):
        LemoConfig.parse(value)
