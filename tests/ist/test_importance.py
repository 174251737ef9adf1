"""Importance learned by suppression: the identities of the update, and that it finds a planted one."""

import math

import pytest
import torch

from hf_tokenseek import IstConfig
from hf_tokenseek.ist.importance import Importance

LAYERS = 8
REWARDS = ["standardised", "exp"]


def learner(**options):
    return Importance(IstConfig(**options), LAYERS)


def sets_of(seed=0, **options):
    return learner(**options).sets(torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("reward", REWARDS)
def test_rewards_add_up_to_zero_and_so_do_the_first_changes(reward):
    own = learner(reward=reward)
    assert sum(own.rewards([1.0, 1.3, 0.7, 2.0])) == pytest.approx(0, abs=1e-12)
    own = learner(reward=reward)
    own.update(sets_of(), [1.0, 1.3, 0.7, 2.0])
    assert sum(own.values) == pytest.approx(0, abs=1e-8) and any(own.values)


@pytest.mark.parametrize("reward", REWARDS)
def test_losses_that_are_all_the_same_teach_nothing(reward):
    own = learner(reward=reward)
    own.update(sets_of(), [1.7] * 4)
    assert own.values == [0.0] * LAYERS
    # and do not spoil what comes
    own.update(sets_of(), [1.0, 1.3, 0.7, 2.0])
    assert all(math.isfinite(value) for value in own.values) and any(own.values)


@pytest.mark.parametrize("reward", REWARDS)
def test_a_layer_only_ever_in_the_cheaper_sets_loses_importance(reward):
    own = learner(reward=reward)
    own.update([[0, 1], [2, 3]], [1.0, 2.0])
    assert own.values[0] == own.values[1] < 0 < own.values[2] == own.values[3]
    assert own.values[4:] == [0.0] * 4


def test_the_bound_of_a_change():
    own, losses = learner(reward="exp", candidates=3), [0.3, 1.3, 0.7]
    rewards = own.rewards(losses)
    own.update(sets_of(candidates=3), losses)
    assert max(map(abs, own.values)) <= 3 * 10 / 4 * max(map(abs, rewards)) <= 3 * 10 / 4


def test_exp_is_the_released_update_with_the_sign_of_its_name():
    own, score = learner(reward="exp", candidates=3), [0.0] * LAYERS
    for seed in range(5):
        sets, losses = own.sets(torch.Generator().manual_seed(seed)), [1.0 + 0.1 * seed, 1.2, 0.9]
        p = [1 / (1 + math.exp(-s)) for s in score]
        mean = sum(math.exp(-loss) for loss in losses) / 3
        for layers, loss in zip(sets, losses, strict=True):
            for i in layers:
                score[i] += 10 * (math.exp(-loss) - mean) * p[i] * (1 - p[i])
        own.update(sets, losses)
        assert own.values == pytest.approx([-s for s in score], abs=1e-12)


def test_standardised_does_not_depend_on_the_scale_of_the_losses():
    values = []
    for scale in (1.0, 1e-4, 50.0):
        own = learner()
        for seed in range(4):
            own.update(sets_of(seed), [scale * loss for loss in (1.0, 1.3, 0.7 + 0.1 * seed, 2.0)])
        values.append(own.values)
    assert values[1] == pytest.approx(values[0]) and values[2] == pytest.approx(values[0])


def test_sets_have_their_size_and_antithetic_ones_are_complements():
    sets = sets_of(suppressed=0.3, candidates=3)
    assert [len(layers) for layers in sets] == [2, 2, 2]
    first, second, third, fourth = sets_of(antithetic=True)
    assert sorted(first + second) == sorted(third + fourth) == list(range(LAYERS))


@pytest.mark.parametrize("options", [{}, {"reward": "exp", "rate": 60.0}])
def test_finds_a_planted_importance_after_a_hundred_updates(options):
    layers = 32
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        cost = torch.rand(layers, generator=generator, dtype=torch.float64) * 0.02
        own = Importance(IstConfig(**options), layers)
        for _ in range(100):
            sets = own.sets(generator)
            own.update(sets, [1.5 + float(cost[drawn].sum()) for drawn in sets])
        assert spearman(torch.tensor(own.values), cost) >= 0.9


def spearman(a, b):
    ranks = torch.stack([a.argsort().argsort(), b.argsort().argsort()]).double()
    return float(torch.corrcoef(ranks)[0, 1])
