"""Who trains in a period."""

import pytest

from hf_tokenseek import IstConfig
from hf_tokenseek.ist.config import POLICIES
from hf_tokenseek.ist.policies import Policy

LAYERS = 12


def policy(name="random", layers=LAYERS, **options):
    return Policy(IstConfig(policy=name, **options), layers)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize(("share", "size"), [(0.25, 3), (0.01, 1), (0.5, 6)])
def test_size_and_lowest_layer_are_kept(name, share, size):
    own = Policy(IstConfig(policy=name, layers=share, lowest=0.4), LAYERS)
    for step in range(0, 400, 20):
        drawn, chances = own.draw(step)
        assert drawn == sorted(set(drawn)) and len(drawn) == size and drawn[0] >= round(0.4 * LAYERS)
        assert sum(chances) == pytest.approx(size) and chances[:4] == [0.0] * 4


@pytest.mark.parametrize("name", POLICIES)
def test_all_layers_are_all_layers(name):
    drawn, chances = Policy(IstConfig(policy=name, layers=1.0), LAYERS).draw(0)
    assert drawn == list(range(LAYERS)) and chances == pytest.approx([1.0] * LAYERS)


def test_the_topmost_layers_only():
    drawn, _ = policy(lowest=0.75).draw(20)
    assert drawn == [9, 10, 11]


@pytest.mark.parametrize("name", POLICIES)
def test_a_step_has_one_draw_whoever_asks_and_after_a_resume(name):
    first, second = policy(name), policy(name)
    for own in (first, second):
        own.importance.update([[0, 1, 2], [3, 4, 5]], [1.0, 2.0])
        own.observe_norms({0: 3.0, 5: 1.0})
    resumed = policy(name)
    resumed.load_state_dict(first.state_dict())
    for step in (40, 60):
        assert first.draw(step) == second.draw(step) == resumed.draw(step)
        assert first.sets(step) == second.sets(step) == resumed.sets(step)
    if name not in ("top", "round_robin"):
        assert len({tuple(first.draw(step)[0]) for step in range(0, 400, 20)}) > 5
        assert any(first.draw(step) != policy(name, seed=1).draw(step) for step in range(0, 100, 20))


def test_the_important_are_drawn_more_often_and_top_takes_them():
    drawing, top = policy("ist"), policy("top")
    for own in (drawing, top):
        own.importance.values = [-3.0] * 6 + [3.0] * 6
    chances = drawing.draw(0)[1]
    assert min(chances[6:]) > 10 * max(chances[:6])
    assert top.draw(0)[0] == [9, 10, 11]
    top.importance.values[2] = 9.0
    assert top.draw(0)[0] == [2, 10, 11]


def test_round_robin_visits_all_layers_equally_often():
    own = policy("round_robin", lowest=0.2)  # ten layers, three at a time
    visits = [layer for period in range(10) for layer in own.draw(20 * period)[0]]
    assert {visits.count(layer) for layer in range(2, LAYERS)} == {3}


def test_gradient_norm_draws_who_has_large_gradients_and_who_has_none_yet():
    own = policy("gradient_norm")
    own.observe_norms(dict.fromkeys(range(10), 1.0))
    own.observe_norms({9: 9.0})
    assert own.norms[9] == 5.0 and own.norms[0] == 1.0
    chances = own.draw(0)[1]
    assert chances[9] == pytest.approx(chances[10]) and chances[9] == pytest.approx(5 * chances[0])


def test_only_policies_that_learn_suppress_layers():
    assert [name for name in POLICIES if policy(name).learns] == ["ist", "top"]
    assert not Policy(IstConfig(layers=1.0), LAYERS).learns
