import itertools
import random

import pytest

from hf_tokenseek.report.record import RunRecord, read_run
from hf_tokenseek.report.statistics import (
    WIDEST,
    added,
    curve,
    jaccard,
    jaccard_by_chance,
    kept_blocks,
    mean_overlaps,
    over_seconds,
    overlaps,
    position_totals,
    trained_layers,
)
from hf_tokenseek.report.tokens import LEVELS, Gap, Token, folded, level_of, ranks_of, token_maps, visible
from tests.report.records import log, visit, write


@pytest.fixture
def run(tmp_path):
    return read_run(write(tmp_path))


def test_jaccard_equals_brute_force():
    generator = random.Random(0)
    for _ in range(200):
        first, second = ({place for place in range(12) if generator.random() < 0.4} for _ in range(2))
        common = sum(place in first and place in second for place in range(12))
        either = sum(place in first or place in second for place in range(12))
        assert jaccard(first, second) == (common / either if either else 1.0)


@pytest.mark.parametrize(("a", "b", "of"), [(2, 3, 6), (1, 5, 5), (4, 4, 4), (0, 2, 5)])
def test_overlap_by_chance_has_the_expected_intersection_of_all_pairs(a, b, of):
    pairs = list(itertools.product(itertools.combinations(range(of), a), itertools.combinations(range(of), b)))
    common = sum(len(set(first) & set(second)) for first, second in pairs) / len(pairs)
    assert jaccard_by_chance(a, b, of) == pytest.approx(common / (a + b - common))
    assert jaccard_by_chance(0, 0, 0) == 1.0


def test_overlap_of_evidence_from_visit_to_visit(run):
    # sample 0 kept 0 and 1, then 0 and 3; sample 1 the same two twice; 6 of 8 tokens are free
    chance = jaccard_by_chance(2, 2, 6)
    assert overlaps(run, 0) == [(2, 1 / 3, chance)]
    assert overlaps(run, 1) == [(2, 1.0, chance)]
    assert mean_overlaps(run) == [(2, pytest.approx(2 / 3), pytest.approx(chance))]


def test_plain_visits_have_no_overlap():
    plain = {**visit(2, 0, "11111111"), "scores": None}
    run = RunRecord("run", samples={0: {"texts": ["x"] * 8}}, visits=[visit(1, 0, "10000020"), plain])
    assert overlaps(run, 0) == mean_overlaps(run) == []
    assert "trained plainly" in token_maps(run)[0].summary


def test_histograms_add_up(run):
    totals = position_totals(run)
    assert totals == {"ditched": [6, 4, 0], "evidence": [2, 0, 2], "loss": [0, 2, 4]}
    assert sum(map(sum, totals.values())) == sum(
        sum(p[k]) for p in run.positions for k in ("ditched", "evidence", "loss")
    )
    assert position_totals(RunRecord("run")) == {}


def test_curves_over_steps_and_over_seconds(run):
    assert curve(run, "eval_loss") == ([0, 4], [3.5, 2.5])
    assert curve(run, "memory/saved_activations_mib") == ([1, 2, 3, 4], [10, 20, 30, 40])
    assert over_seconds(run, "loss").x == [0.5, 1.0, 1.5, 2.0]
    # a log every second step: the mean of two steps counts twice
    sparse = RunRecord("run", logs=[log(s, loss=1.0, **{"speed/step_seconds": s})["entry"] for s in (2, 4)])
    assert over_seconds(sparse, "loss").x == [4, 12]
    assert curve(run, "no such key") == ([], [])


def test_heat_map_of_trained_layers(run):
    assert trained_layers(run) == ([[1, 0, 1], [0, 0, 0], [0, 1, 0]], [1, 2, 4, 5])
    assert trained_layers(RunRecord("run")) is None
    many = RunRecord("run", draws=[{"step": 1 + s, "layers": [s % 2], "of": 2} for s in range(2 * WIDEST)])
    found = trained_layers(many)
    assert found.values == [[0.5] * WIDEST] * 2
    assert found.edges == [*range(1, 2 * WIDEST, 2), 2 * WIDEST + 1]


def test_heat_map_of_kept_blocks_is_a_share_of_the_most_kept_one(run):
    assert kept_blocks(run) == ([[1.0, 0.5, 1.0], [1.0, 0.0, 0.25]], [0, 1, 2, 3])
    assert kept_blocks(RunRecord("run", grids=[{"values": [[2], [1, 2]]}])).values == [[1.0, 0.0], [0.5, 1.0]]
    assert kept_blocks(RunRecord("run", grids=[{"values": [[0], [0]]}])).values == [[0.0], [0.0]]


def test_tables_of_different_sizes_add_up():
    assert added([], [[1, 2]]) == [[1, 2]]
    assert added([[1, 2], [3]], [[1], [1, 1], [5]]) == [[2, 2], [4, 1], [5]]


def test_ranks_and_levels():
    assert ranks_of([0.5, 2.0, None, 0.5, -1.0]) == [2, 1, 5, 3, 4]
    levels = [level_of(rank, 30) for rank in range(1, 31)]
    assert levels == sorted(levels, reverse=True)
    assert [levels.count(level) for level in range(LEVELS)] == [3] * LEVELS
    assert (level_of(1, 1), level_of(1, 3), level_of(3, 3)) == (9, 9, 3)


def test_token_map_says_what_happened_to_each_token(run):
    first, second = token_maps(run)
    assert [part.kind for part in first.parts] == [
        "evidence",
        *["ditched"] * 2,
        "evidence",
        "ditched",
        *["loss"] * 2,
        "ditched",
    ]
    assert first.details["selected"] == [2, 1, 0, 1, 0, 2, 2, 0]
    assert first.details["visits"] == 2
    assert first.details["names"] == ["score", "attention mass", "loss"]
    assert first.details["ranks"][3] == 1
    assert first.summary.startswith(
        "8 tokens, of which 2 loss rows and 2 evidence (50% selected); visit 2, optimizer step 3."
    )
    assert first.summary.endswith("Overlap of the evidence with the visit before 0.33 (by chance 0.20).")
    assert second.number == 2


def test_invisible_tokens_are_made_visible():
    assert visible("a\n\tb") == "a↵\n→\tb"
    assert visible("") == "∅"
    assert visible(" a") == " a"


def test_long_sequences_fold_what_is_far_from_a_selected_token():
    tokens = [Token(place, "x", "evidence" if place in (10, 13, 40) else "ditched", 0) for place in range(50)]
    assert folded(tokens, most=50) == tokens
    parts = folded(tokens, most=49, margin=2)
    assert parts == [Gap(8), *tokens[8:16], Gap(22), *tokens[38:43], Gap(7)]
    assert sum(part.count if isinstance(part, Gap) else 1 for part in parts) == 50
