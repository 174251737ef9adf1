"""Means of figures that nobody may ever read."""

import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_tokenseek.means import Means

NUMBERS = st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(float("nan"))), min_size=1)


@given(NUMBERS, st.booleans())
def test_are_the_means_of_what_is_a_number(values, as_tensors):
    means = Means()
    for value in values:
        means.add("figure", torch.tensor(value, dtype=torch.float64) if as_tensors else value)
    numbers = [value for value in values if value == value]
    expected = {"figure": pytest.approx(sum(numbers) / len(numbers), abs=1e-9)} if numbers else {}
    assert means.read(reset=False) == expected
    assert means.read() == expected and means.read() == {}


def test_names_are_apart_and_begin_anew():
    means = Means()
    means.add("a", 1.0), means.add("a", 3.0), means.add("b", torch.tensor(5))
    assert means.read() == {"a": 2.0, "b": 5.0}
    means.add("a", 7.0)
    assert means.read() == {"a": 7.0}


def test_keep_nothing_of_what_they_were_given():
    means, given_away = Means(), []
    for number in range(3):
        value = torch.full((), float(number), requires_grad=True) * 2
        given_away.append(weakref.ref(value))
        means.add("figure", value)
        del value
    assert all(reference() is None for reference in given_away)
    assert means.read() == {"figure": 2.0}
