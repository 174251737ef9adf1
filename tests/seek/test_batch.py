import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_tokenseek.seek import SeekConfig
from hf_tokenseek.seek.batch import IGNORE, Sizes, prepare

CONFIG = SeekConfig(context=0.25)


def make(labels, config=CONFIG, **inputs):
    labels = torch.tensor(labels)
    tokens = torch.arange(labels.numel()).view(labels.shape)
    return prepare(config, tokens, labels, **{k: torch.tensor(v) if k != "sizes" else v for k, v in inputs.items()})


def targets_by_hand(labels, real):
    """Position i predicts the label of i + 1; padding predicts nothing."""
    return [
        [row[i + 1] if i + 1 < len(row) and own[i] else IGNORE for i in range(len(row))]
        for row, own in zip(labels, real, strict=True)
    ]


def test_targets_and_counts_of_plain_sequences():
    labels = [[-100, -100, 5, 6, 7, 8], [1, 2, 3, 4, -100, -100]]
    batch = make(labels)
    assert batch.targets.tolist() == targets_by_hand(labels, [[1] * 6] * 2)
    # the first token is never predicted, the last predicts nothing
    assert batch.sizes.real == [6, 6] and batch.sizes.labelled == [4, 3]
    assert batch.sizes.simple and batch.visibility is None
    assert batch.positions.tolist() == [list(range(6))] * 2
    assert batch.shape == (2, 6)


@pytest.mark.parametrize(
    ("mask", "simple"),
    [
        ([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]], True),
        ([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]], False),
        ([[1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]], False),
        ([[0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]], False),
    ],
    ids=["right", "left", "hole", "all padding"],
)
def test_padding(mask, simple):
    labels = [[10, 11, 12, 13, 14, 15], [-100, 21, 22, 23, 24, 25]]
    batch = make(labels, attention_mask=mask)
    assert batch.targets.tolist() == targets_by_hand(labels, mask)
    assert batch.segments.tolist() == [[m - 1 for m in row] for row in mask]
    assert batch.sizes.real == [sum(row) for row in mask]
    assert batch.sizes.labelled == [sum(t != IGNORE for t in row) for row in batch.targets.tolist()]
    assert batch.sizes.simple is simple
    assert (batch.visibility is None) is simple
    # a plain model given no positions counts by index, whatever the mask
    assert batch.positions.tolist() == [list(range(6))] * 2


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int32])
def test_mask_of_any_dtype(dtype):
    mask = torch.tensor([[0, 1, 1, 1]]).to(dtype)
    batch = prepare(CONFIG, torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long), mask)
    assert batch.segments.tolist() == [[-1, 0, 0, 0]]


@pytest.mark.parametrize(
    "mask", [[[1, 1, 1, 0, 0]], [[0, 0, 1, 1, 1]], [[1, 1, 1, 1, 1]]], ids=["right", "left", "whole"]
)
def test_positions_counted_by_the_mask_equal_opts(mask):
    """modeling_opt.py: `cumsum(mask) * mask - 1`."""
    batch = make([[1] * 5], attention_mask=mask, positions_from_mask=True)
    seen = [sum(mask[0][: i + 1]) * mask[0][i] - 1 for i in range(5)]
    assert batch.positions.tolist() == [seen]


def test_given_positions_are_kept():
    batch = make([[1] * 4, [2] * 4], position_ids=[[7, 8, 9, 10]], attention_mask=[[1] * 4] * 2)
    assert batch.positions.tolist() == [[7, 8, 9, 10]] * 2
    # with a mask, transformers does not read documents from positions
    assert batch.sizes.simple


def test_packed_by_positions():
    labels = [[1, 2, 3, -100, 5, 6, -100], [1, 2, 3, 4, 5, 6, 7]]
    batch = make(labels, position_ids=[[0, 1, 2, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5, 6]])
    assert batch.segments.tolist() == [[0, 0, 0, 1, 1, 1, 2], [0] * 7]
    assert not batch.sizes.simple and batch.visibility is batch.segments
    assert batch.targets.tolist() == targets_by_hand(labels, [[1] * 7] * 2)


def test_packed_by_positions_agrees_with_transformers():
    from transformers.masking_utils import find_packed_sequence_indices

    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0], [3, 4, 5, 6, 0, 1, 0, 0]])
    batch = make([[1] * 8] * 2, position_ids=positions.tolist())
    assert torch.equal(batch.segments, find_packed_sequence_indices(positions))


def test_packed_by_limits():
    positions = [[0, 1, 2, 0, 1, 0, 1, 2]]
    batch = make([[1] * 8], position_ids=positions, cu_seq_lens=[0, 3, 5, 8])
    assert batch.segments.tolist() == [[0, 0, 0, 1, 1, 2, 2, 2]]
    assert torch.equal(batch.segments, make([[1] * 8], position_ids=positions).segments)
    # what lies behind the last document is padding
    tail = make([[1] * 8], position_ids=positions, cu_seq_lens=[0, 3, 5])
    assert tail.segments.tolist() == [[0, 0, 0, 1, 1, -1, -1, -1]]
    assert tail.sizes.real == [5] and (tail.targets[:, 5:] == IGNORE).all()


def test_embeddings_instead_of_ids():
    batch = prepare(CONFIG, torch.zeros(2, 5, 16), torch.ones(2, 5, dtype=torch.long))
    assert batch.shape == (2, 5) and batch.sizes.labelled == [4, 4]


def test_planned_sizes_are_taken_as_they_are():
    planned = Sizes([6], [2], False, [1], [1])
    assert make([[-100, -100, 5, 6, 7, 8]], sizes=planned).sizes is planned


def test_errors():
    with pytest.raises(ValueError, match=r"`labels` \(1, 4\).*\(1, 5\)"):
        prepare(CONFIG, torch.zeros(1, 5, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"2-D attention mask.*\(1, 1, 5, 5\).*padding mask"):
        make([[1] * 5], attention_mask=torch.ones(1, 1, 5, 5).tolist())
    with pytest.raises(ValueError, match=r"cu_seq_lens.*batch of 2"):
        make([[1] * 4] * 2, cu_seq_lens=[0, 2, 4])


shares = st.decimals(0, 1, places=2, allow_nan=False, allow_infinity=False)
counts = st.lists(st.tuples(st.integers(0, 400), st.floats(0, 1)), min_size=1, max_size=4)


def counted(pairs):
    real = [n for n, _ in pairs]
    return real, [math.floor(share * max(0, n - 1)) for n, share in pairs]


def ceiling(share, n):
    """Exact: 0.07 of 100 are 7, not the 8 of binary floating point."""
    return math.ceil(Fraction(str(share)) * n)


@settings(max_examples=60, deadline=None)
@given(counts, shares, shares.filter(bool))
def test_plan_of_two_stages(pairs, context, labelled_share):
    real, labelled = counted(pairs)
    config = SeekConfig(context=float(context), labelled=float(labelled_share))
    sizes = Sizes.plan(real, labelled, True, config)
    assert sizes.loss == [ceiling(labelled_share, n) for n in labelled]
    assert sizes.evidence == [ceiling(context, r - n) for r, n in zip(real, sizes.loss, strict=True)]
    assert all(a + b <= r for a, b, r in zip(sizes.loss, sizes.evidence, real, strict=True))
    assert sizes.rows == max(1, max(a + b for a, b in zip(sizes.loss, sizes.evidence, strict=True)))


@settings(max_examples=60, deadline=None)
@given(counts, shares.filter(bool))
def test_plan_of_one_budget(pairs, ratio):
    real, labelled = counted(pairs)
    sizes = Sizes.plan(real, labelled, True, SeekConfig(ratio=float(ratio)))
    assert [a + b for a, b in zip(sizes.loss, sizes.evidence, strict=True)] == [ceiling(ratio, r) for r in real]
    assert all(a <= n for a, n in zip(sizes.loss, labelled, strict=True))
