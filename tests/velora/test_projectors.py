"""Directions: orthonormal in each group, along the average where they should be, unbiased where they say so."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_tokenseek import VeloraConfig
from hf_tokenseek.velora.projectors import make_projector
from tokenseek_kernels import compress, expand

LIKE = torch.zeros(1)


def drawn(projector, width, groups, rank=None, mean=None, seed=0):
    made = make_projector(VeloraConfig(groups=groups, projector=projector, rank=rank), width)
    generator = torch.Generator().manual_seed(seed)
    made.draw(torch.randn(width, generator=generator) if mean is None else mean, generator, LIKE)
    return made


def by_group(projector):
    """`(rank, size)` for each group, as many columns as it has features."""
    return projector.directions.split(projector.size, dim=1)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(["average", "random", "mixed"]), st.integers(1, 40))
def test_directions_are_orthonormal_in_each_group(data, kind, width):
    groups = data.draw(st.integers(1, 50))
    rank = {"average": 1, "random": data.draw(st.integers(1, 4)), "mixed": data.draw(st.integers(2, 4))}[kind]
    projector = drawn(kind, width, groups, rank, seed=data.draw(st.integers(0, 5)))
    assert projector.directions.shape == (rank, width) and projector.columns == projector.groups * rank
    assert projector.groups <= groups and (projector.groups - 1) * projector.size < width
    for group in by_group(projector):
        expected = torch.zeros(rank, rank)
        expected[range(min(rank, group.shape[1])), range(min(rank, group.shape[1]))] = 1.0
        torch.testing.assert_close(group @ group.T, expected, rtol=1e-5, atol=1e-5)


def test_the_average_is_that_of_all_groups():
    mean = torch.randn(12)
    projector = drawn("average", 12, 3, mean=mean)
    average = mean.view(3, 4).mean(0)
    assert torch.allclose(projector.directions.view(3, 4), (average / average.norm()).expand(3, 4))


def test_an_average_of_zero_is_all_ones():
    projector = drawn("average", 10, 3, mean=torch.zeros(10))
    for group in by_group(projector):
        assert torch.allclose(group, torch.full_like(group, group.shape[1] ** -0.5))


@pytest.mark.parametrize("rank", [4, 7])
@pytest.mark.parametrize("kind", ["random", "mixed"])
def test_as_many_directions_as_features_lose_nothing(kind, rank):
    projector, x = drawn(kind, 10, 3, rank), torch.randn(5, 10)
    rebuilt = expand(compress(x, projector.directions, projector.size), projector.expansion, projector.size)
    torch.testing.assert_close(rebuilt, x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "rank"), [("random", 1), ("random", 3), ("mixed", 2), ("mixed", 4)])
def test_the_expectation_is_the_identity(kind, rank):
    """`E[P E^T] = 1`, a short last group included; the tolerance is five standard errors of 4,000 draws."""
    width, size, draws = 11, 4, 4000
    mean = torch.randn(width, generator=torch.Generator().manual_seed(1))
    products = []
    for seed in range(draws):
        projector = drawn(kind, width, 3, rank, mean, seed)
        assert projector.size == size
        z = compress(torch.eye(width), projector.directions, size)
        products.append(expand(z, projector.expansion, size))
    products = torch.stack(products)
    error = (products.mean(0) - torch.eye(width)).abs()
    assert (error <= 5 * products.std(0) / draws**0.5 + 1e-5).all()


def test_the_same_seed_draws_the_same():
    first, again, other = (drawn("random", 30, 4, 2, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.directions, again.directions) and not torch.equal(first.directions, other.directions)


def test_overlap_is_the_cosine_of_old_and_new_directions():
    projector = drawn("average", 10, 3)
    old = by_group(projector)
    projector.draw(torch.randn(10), torch.Generator(), LIKE)
    expected = [float(a[0] @ b[0]) for a, b in zip(old, by_group(projector), strict=True)]
    assert projector.overlap.tolist() == pytest.approx(expected, abs=1e-6) and projector.version == 2
