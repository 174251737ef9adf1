"""`VeloraConfig`: what is allowed, and what is said about the rest."""

import pytest

from hf_tokenseek import TokenSeekArguments, VeloraConfig


def test_defaults():
    config = VeloraConfig()
    assert (config.groups, config.inputs, config.projector) == (32, ("attention", "mlp", "down"), "average")
    assert (config.rank, config.refresh_steps) == (1, 0)
    assert VeloraConfig(projector="random").refresh_steps == 1
    assert (VeloraConfig(projector="mixed").rank, VeloraConfig(projector="mixed").refresh_steps) == (2, 1)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"groups": 0}, "`groups` should be at least 1, got 0"),
        ({"groups": 1.5}, "`groups` should be a whole number, got 1.5"),
        ({"groups": True}, "whole number"),
        ({"inputs": ["v_proj"]}, r"`inputs` should be some of \['attention', 'mlp', 'down'\], got \['v_proj'\]"),
        ({"inputs": []}, "should be some of"),
        ({"projector": "svd"}, "`projector` should be one of"),
        ({"projector": "average", "rank": 2}, "Use projector='mixed'"),
        ({"projector": "mixed", "rank": 1}, "rank of at least 2"),
        ({"projector": "random", "refresh_steps": 0}, "`refresh_steps` of at least 1"),
        ({"projector": "random", "compressed_state": True}, "Set compressed_state=False"),
        ({"moments": "keep"}, "`moments` should be one of"),
        ({"refresh_steps": -1}, "at least 0"),
        ({"probe_steps": -1}, "at least 0"),
    ],
)
def test_what_is_outside_is_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        VeloraConfig(**fields)


def test_arguments_take_it_in_every_form(tmp_path):
    expected = VeloraConfig(groups=8, inputs=("down",))
    for value in (expected, {"groups": 8, "inputs": ["down"]}, '{"groups": 8, "inputs": "down"}'):
        arguments = TokenSeekArguments(output_dir=str(tmp_path), velora=value)
        assert arguments.velora == expected and arguments.to_dict()["velora"]["groups"] == 8
    assert TokenSeekArguments(output_dir=str(tmp_path)).velora is None
    with pytest.raises(ValueError, match=r"`velora` should be JSON such as '\{\"groups\": 32\}'"):
        TokenSeekArguments(output_dir=str(tmp_path), velora="some")
    with pytest.raises(ValueError, match=r"`velora` has unknown fields \['group'\]"):
        VeloraConfig.parse({"group": 8})
