"""Draws of a fixed size with known probabilities."""

import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_tokenseek.ist.sampling import draw, inclusion_probabilities

weights = st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=12)


@given(weights, st.data())
def test_probabilities_are_proportional_until_they_are_certain_and_add_up(values, data):
    count = data.draw(st.integers(1, len(values)))
    found = inclusion_probabilities(values, count)
    assert sum(found) == pytest.approx(count) and all(0 < p <= 1 for p in found)
    uncertain = [p / w for p, w in zip(found, values, strict=True) if p < 1 - 1e-9]
    assert not uncertain or max(uncertain) == pytest.approx(min(uncertain))
    # nobody is certain who would not have been pushed there
    share = max(uncertain, default=0.0)
    assert all(w * share >= 1 - 1e-6 for p, w in zip(found, values, strict=True) if p >= 1 - 1e-9 and share)


@given(weights, st.data())
def test_a_draw_has_its_size_is_distinct_and_never_takes_the_impossible(values, data):
    values = [*values, 0.0]
    count = data.draw(st.integers(1, len(values) - 1))
    drawn = draw(inclusion_probabilities(values, count), torch.Generator().manual_seed(data.draw(st.integers(0, 999))))
    assert drawn == sorted(set(drawn)) and len(drawn) == count and len(values) - 1 not in drawn


def test_each_is_drawn_with_its_own_probability():
    probabilities, times = inclusion_probabilities([1, 2, 3, 4, 20, 0], 3), 20_000
    generator, seen = torch.Generator().manual_seed(0), Counter()
    for _ in range(times):
        seen.update(draw(probabilities, generator))
    for index, p in enumerate(probabilities):
        assert abs(seen[index] / times - p) <= 5 * math.sqrt(p * (1 - p) / times)


def test_equal_weights_give_every_subset_the_same_chance_and_the_lowest_index_its_mean():
    count, size, times = 6, 2, 30_000
    probabilities = inclusion_probabilities([1.0] * count, size)
    assert probabilities == pytest.approx([size / count] * count)
    generator = torch.Generator().manual_seed(0)
    seen = Counter(tuple(draw(probabilities, generator)) for _ in range(times))
    p = 1 / math.comb(count, size)
    for subset in itertools.combinations(range(count), size):
        assert abs(seen[subset] / times - p) <= 5 * math.sqrt(p * (1 - p) / times)
    mean = sum(subset[0] * n for subset, n in seen.items()) / times
    # (L + 1) / (N + 1) - 1, counted from 0; its standard deviation is below 1.3
    assert abs(mean - ((count + 1) / (size + 1) - 1)) <= 5 * 1.3 / math.sqrt(times)
