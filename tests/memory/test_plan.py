from dataclasses import replace
from itertools import takewhile

import pytest
import yaml

from hf_tokenseek.memory import Training, estimate, first_fitting, plan, try_ways
from hf_tokenseek.memory.plan import WAYS, budget_of, parse_size, recipe_options
from recipes.sft import parse_arguments
from tests.seek.tiny_families import tiny_config

SMALL = Training(seq=128, batch=2, dtype="fp32", device="cpu")


def config_of(family="llama"):
    config = tiny_config(family)
    config.use_cache = False
    return config


def test_exact_ways_come_first_and_names_are_distinct():
    exact = [way.exact for way in WAYS]
    assert exact == sorted(exact, reverse=True) and WAYS[0].methods == {}
    assert len({way.name for way in WAYS}) == len(WAYS)
    # on all tokens, in layers that compute the same
    for way in WAYS:
        others = {name: value for name, value in way.methods.items() if name not in ("lean", "mlp_tiles")}
        assert way.exact == (others in ({}, {"seek": {"context": 1.0}}))


def test_the_first_that_fits_is_found_and_nothing_behind_it_is_tried(monkeypatch):
    config, sizes = config_of(), {}
    # LeMo leaves the first two as they are
    config.num_hidden_layers = 3
    for tried in try_ways(config, SMALL, 0):
        assert not tried.fits and tried.refusal == ""
        sizes[tried.way.name] = tried.estimate.peak.bytes
    budget = sizes["lean + chunked loss"]
    expected = list(takewhile(lambda way: sizes[way.name] > budget, WAYS))
    simulated = []
    monkeypatch.setattr(plan, "estimate", lambda *args: simulated.append(args) or estimate(*args))
    (found,) = first_fitting(config, SMALL, budget)
    assert found.way == WAYS[len(expected)] and found.estimate.peak.bytes <= budget
    assert len(simulated) == len(expected) + 1
    assert first_fitting(config, SMALL, 0) == []
    assert [t.way for t in first_fitting(config, SMALL, max(sizes.values()), 3)] == list(WAYS[:3])


def test_what_a_family_refuses_is_said_and_passed_over():
    tried = {t.way.name: t for t in try_ways(config_of("gpt2"), SMALL, 2**40)}
    assert "finds nothing to swap" in str(tried["lean"]) and not tried["lean"].fits
    assert tried["seek + checkpointing"].fits


def test_what_is_trained_stays_as_it_is():
    pytest.importorskip("peft")
    training = replace(SMALL, lora=2, optimizer="sgd")
    for way in WAYS:
        mine = way.of(training)
        assert replace(mine, methods={}, checkpointing=False) == training


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
@pytest.mark.parametrize(("lora", "load_in_4bit"), [(None, False), (4, False), (4, True)])
def test_the_recipe_takes_the_options(tmp_path, way, lora, load_in_4bit):
    training = way.of(Training(seq=256, batch=3, dtype="mixed", lora=lora, load_in_4bit=load_in_4bit))
    file = tmp_path / "fit.yaml"
    file.write_text(yaml.safe_dump(recipe_options(training, "smollm2")))
    options = ["--config", str(file), "--use_cpu", "true", "--output_dir", str(tmp_path)]
    model, data, arguments = parse_arguments(options)
    assert (model.model, model.use_peft, data.max_length) == ("smollm2", lora is not None, 256)
    assert lora is None or model.lora_r == lora
    assert model.load_in_4bit == load_in_4bit
    assert arguments.per_device_train_batch_size == 3 and arguments.bf16
    assert arguments.gradient_checkpointing == way.checkpointing
    assert arguments.optim == training.optimizer
    for name in ("seek", "velora", "ist", "lemo", "lean"):
        assert bool(getattr(arguments, name)) == bool(way.methods.get(name))
    assert arguments.mlp_tiles == way.methods.get("mlp_tiles", 1)
    if isinstance(way.methods.get("seek"), dict):
        assert arguments.seek.context == 1.0


def test_sizes_and_budgets():
    assert parse_size("24GiB") == 24 * 2**30 and parse_size("1.5 GB") == 1_500_000_000
    assert parse_size("512MiB") == 2**29
    for text in ("24", "24 gib", "GiB", "-1GiB", "1.2.3GiB"):
        with pytest.raises(ValueError, match="such as 24GiB, got"):
            parse_size(text)
    assert budget_of(1000, 0.1) == 900
    with pytest.raises(ValueError, match=r"`headroom` should be a share in \[0, 1\), got 1"):
        budget_of(1000, 1)
