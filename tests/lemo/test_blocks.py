"""Which blocks a layer keeps, against a selection by hand and the laws that hold whatever the scores."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_tokenseek.lemo import LemoConfig
from hf_tokenseek.lemo.blocks import Blocks
from hf_tokenseek.seek.batch import IGNORE
from tests.lemo.tiny_lemo import lemo

NAN, INF = math.nan, math.inf
shares = st.sampled_from([0.01, 0.1, 0.29, 0.4, 0.5, 0.99, 1.0])


def blocks_of(mask, labels=None, documents=None, **fields) -> Blocks:
    """Blocks of sequences whose real tokens are those of `mask`; positions with `labels` predict something."""
    mask = torch.as_tensor(mask, dtype=torch.bool)
    documents = torch.zeros_like(mask, dtype=torch.long) if documents is None else torch.as_tensor(documents)
    targets = torch.full(mask.shape, IGNORE)
    if labels is not None:
        targets = targets.masked_fill(torch.as_tensor(labels) & mask, 7)
    return Blocks(documents.masked_fill(~mask, -1), targets, mask.sum(1).tolist(), lemo(**fields))


@st.composite
def problems(draw, values=st.integers(-2, 2), **fixed):  # noqa: B008
    """Sequences with padding and labels anywhere, of documents of any length, and scores of blocks with many ties."""
    batch, n = draw(st.integers(1, 3)), draw(st.integers(1, 20))

    def table(cells, width):
        row = st.lists(cells, min_size=width, max_size=width)
        return draw(st.lists(row, min_size=batch, max_size=batch))

    mask = table(st.booleans(), n)
    for row in mask:
        # a sequence without a token is no sequence
        row[draw(st.integers(0, n - 1))] = True
    fields = {
        "block": draw(st.integers(1, 5)),
        "sinks": draw(st.integers(0, 2)),
        "recent": draw(st.integers(0, 2)),
        "labelled": draw(st.booleans()),
        "queries": draw(st.sampled_from(["labelled", "later", "all", "earlier"])),
        **fixed,
    }
    # labels are few
    labelled = table(st.sampled_from([False] * 4 + [True]), n)
    begins = table(st.sampled_from([False] * 5 + [True]), n) if draw(st.booleans()) else [[False] * n] * batch
    documents = torch.tensor(begins).cumsum(1)
    blocks = blocks_of(mask, labelled, documents, **fields)
    scores = torch.tensor(table(values, blocks.count), dtype=torch.float32)
    return blocks, scores, mask, labelled, documents.tolist()


def cut_by_hand(mask: list[bool], block: int) -> list[list[int]]:
    """Positions of the real tokens, in blocks."""
    real = [position for position, there in enumerate(mask) if there]
    return [real[first : first + block] for first in range(0, len(real), block)]


def edges_by_hand(own: list[list[int]], documents: list[int], config: LemoConfig) -> set[int]:
    """Blocks that are always kept: the first and the last ones of each document."""
    edges = set()
    for document in set(documents):
        mine = [index for index, block in enumerate(own) if any(documents[position] == document for position in block)]
        edges |= {*mine[: config.sinks], *mine[max(0, len(mine) - config.recent) :]}
    return edges


def labelled_by_hand(own: list[list[int]], labelled: list[bool], config: LemoConfig) -> set[int]:
    """Blocks that have labels, where not all do."""
    found = {index for index, block in enumerate(own) if any(labelled[position] for position in block)}
    return found if config.labelled and len(found) < len(own) else set()


def ranked_by_hand(scores: list[float], edges: set[int], labelled: set[int], count: int) -> list[int]:
    """Blocks in the order in which they are taken: always, labelled, by score, by index."""

    def rank(index: int):
        always = index in edges
        return (not always, always or index not in labelled, -scores[index], index)

    return sorted(range(count), key=rank)


def budget(share: float, count: int, config: LemoConfig) -> int:
    # shares are hundredths
    return min(count, max(1, config.sinks + config.recent, round(share * 100) * count // 100))


def kept_of(kept, row: int) -> tuple[list[int], list[int]]:
    """Blocks and rows of a sequence, which stand in front of nothing but -1."""
    found = []
    for values in (kept.blocks[row].tolist(), kept.rows[row].tolist()):
        found.append([value for value in values if value >= 0])
    return tuple(found)


@settings(max_examples=200, deadline=None)
@given(problems(), shares)
def test_equals_selection_by_hand(problem, share):
    blocks, scores, masks, labels, documents = problem
    kept = blocks.choose(scores, share)
    for row, (mask, labelled) in enumerate(zip(masks, labels, strict=True)):
        own = cut_by_hand(mask, blocks.config.block)
        assert blocks.counts[row] == len(own)
        edges = edges_by_hand(own, documents[row], blocks.config)
        firm = labelled_by_hand(own, labelled, blocks.config)
        ranked = ranked_by_hand(scores[row].tolist(), edges, firm, len(own))
        expected = sorted(ranked[: budget(share, len(own), blocks.config)])
        found, rows = kept_of(kept, row)
        assert found == expected
        assert rows == [position for index in expected for position in own[index]]


@settings(max_examples=200, deadline=None)
@given(problems(st.sampled_from([NAN, INF, -INF, 0.0, 1.0, -1e38, 3e38])), shares, st.sampled_from([None, 0.0, 1.0]))
def test_laws_hold_whatever_the_scores(problem, share, threshold):
    blocks, scores, masks, _, documents = problem
    least = None if threshold is None else share / 2
    kept = blocks.choose(scores, share, least, threshold or 0.0)
    for row, mask in enumerate(masks):
        found, rows = kept_of(kept, row)
        count = blocks.counts[row]
        most = budget(share, count, blocks.config)
        assert len(found) == most if threshold is None else len(found) <= most
        # ascending and unique, in front of the empty slots
        assert kept.blocks[row].tolist() == sorted(set(found)) + [-1] * (kept.blocks.shape[1] - len(found))
        assert all(0 <= index < count for index in found)
        assert rows == sorted(set(rows)) and all(mask[position] for position in rows)
        edges = edges_by_hand(cut_by_hand(mask, blocks.config.block), documents[row], blocks.config)
        # of many short documents there are more than there is room for
        assert edges <= set(found) if len(edges) <= most else set(found) <= edges


@settings(max_examples=200, deadline=None)
@given(problems(queries="later"), shares, shares, st.sampled_from([0.0, 0.5, 1.0, 2.0, 9.0]))
def test_thresholds_keep_what_is_above_within_bounds(problem, one, other, threshold):
    blocks, scores, masks, labels, documents = problem
    least, most = sorted((one, other))
    kept = blocks.choose(scores, most, least, threshold)
    config = blocks.config
    for row, (mask, labelled) in enumerate(zip(masks, labels, strict=True)):
        own = cut_by_hand(mask, config.block)
        values = [max(0.0, score) for score in scores[row].tolist()][: len(own)]
        mean = sum(values) / len(own)
        edges, has_label = edges_by_hand(own, documents[row], config), labelled_by_hand(own, labelled, config)
        ranked = ranked_by_hand(scores[row].tolist(), edges, has_label, len(own))
        firm = edges | has_label
        # small whole numbers: a score that is exactly the mean is no matter of rounding, unless the mean is
        near = any(mean and abs(value / mean - threshold) < 1e-6 for value in values)
        wanted = {i for i, value in enumerate(values) if i in firm or (value / mean if mean else 0.0) >= threshold}
        expected = [
            index
            for place, index in enumerate(ranked[: budget(most, len(own), config)])
            if place < budget(least, len(own), config) or index in wanted
        ]
        if not near:
            assert kept_of(kept, row)[0] == sorted(expected)


@settings(max_examples=200, deadline=None)
@given(problems(st.integers(-2, 5), queries="earlier"), shares, shares, st.sampled_from([0.0, 0.5, 1.0]), st.data())
def test_no_later_block_decides_about_an_earlier_one(problem, one, other, threshold, data):
    blocks, scores, *_ = problem
    least, most = sorted((one, other))
    before = blocks.choose(scores, most, least, threshold)
    at = data.draw(st.integers(0, blocks.count - 1))
    changed = scores.clone()
    changed[:, at:] = torch.tensor(data.draw(st.lists(st.integers(-2, 50), min_size=1, max_size=1)))
    after = blocks.choose(changed, most, least, threshold)
    for row, count in enumerate(blocks.counts):
        first, second = (kept_of(kept, row)[0] for kept in (before, after))
        assert [index for index in first if index < at] == [index for index in second if index < at]
        for found in (first, second):
            assert budget(least, count, blocks.config) <= len(found) <= budget(most, count, blocks.config)


def test_blocks_above_the_threshold_are_taken_as_they_come():
    blocks = blocks_of(torch.ones(1, 40), queries="earlier", sinks=1, recent=1)
    # the score of one look of each of ten blocks; means so far 4, 2, 2, 3, 2.4, 3, ...
    looks = torch.tensor([[4.0, 0, 2, 6, 0, 6, 0, 0, 6, 0]])
    scores = looks * torch.arange(1, 11)
    means = looks.cumsum(1) / torch.arange(1, 11)
    torch.testing.assert_close(blocks.in_means(scores), looks / means)
    # 2, 3, 5 and 8 reach their mean; the first and the last are always kept
    assert kept_of(blocks.choose(scores, 0.6, 0.1, 1.0), 0)[0] == [0, 2, 3, 5, 8, 9]
    assert kept_of(blocks.choose(scores, 0.4, 0.1, 1.0), 0)[0] == [0, 2, 3, 9]
    # what is wanting comes from the end
    assert kept_of(blocks.choose(scores, 0.9, 0.8, 1.0), 0)[0] == [0, 2, 3, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("share", [0.29, 0.4, 0.5])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(share, side):
    generator = torch.Generator().manual_seed(0)
    for real in (3, 17, 24):
        scores = torch.rand(1, -(-real // 4), generator=generator)
        labelled = torch.rand(1, real, generator=generator) < 0.1
        alone = blocks_of(torch.ones(1, real), labelled).choose(scores, share)
        pad = (24 - real, 0) if side == "left" else (0, 24 - real)
        padded = [torch.nn.functional.pad(values, pad) for values in (torch.ones(1, real), labelled.float())]
        kept = blocks_of(padded[0], padded[1].bool()).choose(scores, share)
        assert torch.equal(kept.blocks, alone.blocks)
        shift = pad[0]
        assert kept_of(kept, 0)[1] == [position + shift for position in kept_of(alone, 0)[1]]


@pytest.mark.parametrize("threshold", [None, 1.0])
def test_a_batch_is_its_sequences_one_by_one(threshold):
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(42) < torch.tensor([[42], [30], [5], [19]])
    blocks, scores = blocks_of(mask), torch.rand(4, 11, generator=generator)
    together = blocks.choose(scores, 0.6, None if threshold is None else 0.1, threshold or 0.0)
    assert len({tuple(kept_of(together, row)[0]) for row in range(4)}) == 4
    for row, count in enumerate(blocks.counts):
        alone = blocks_of(mask[row : row + 1]).choose(
            scores[row : row + 1, :count], 0.6, None if threshold is None else 0.1, threshold or 0.0
        )
        assert kept_of(together, row) == kept_of(alone, 0)


def test_a_last_block_may_be_short():
    blocks = blocks_of(torch.ones(1, 10), sinks=0)
    assert blocks.tokens.tolist() == [[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, -1, -1]]]
    assert kept_of(blocks.choose(torch.tensor([[0.0, 1.0, 2.0]]), 0.7), 0) == ([1, 2], [4, 5, 6, 7, 8, 9])


def test_labelled_blocks_come_first_as_far_as_there_is_room():
    labelled = torch.zeros(1, 40, dtype=torch.bool)
    labelled[0, [9, 17, 30]] = True  # blocks 2, 4 and 7
    scores = torch.tensor([[0.0, 9, 1, 8, 2, 7, 6, 3, 5, 0]])
    found = {
        (own, share): kept_of(blocks_of(torch.ones(1, 40), labelled, labelled=own).choose(scores, share), 0)[0]
        for own in (True, False)
        for share in (0.4, 0.6)
    }
    assert found == {
        (True, 0.4): [0, 4, 7, 9],
        (True, 0.6): [0, 1, 2, 4, 7, 9],
        (False, 0.4): [0, 1, 3, 9],
        (False, 0.6): [0, 1, 3, 5, 6, 9],
    }


@pytest.mark.parametrize("threshold", [0.0, 1.0, 100.0])
def test_thresholds_choose_where_every_token_has_a_label(threshold):
    scores = torch.arange(10.0)[None]
    blocks = blocks_of(torch.ones(1, 40), torch.ones(1, 40, dtype=torch.bool), sinks=1, recent=1)
    # the mean is 4.5; between the edges
    expected = {0.0: list(range(10)), 1.0: [0, 5, 6, 7, 8, 9], 100.0: [0, 9]}[threshold]
    assert kept_of(blocks.choose(scores, 1.0, 0.01, threshold), 0)[0] == expected


@pytest.mark.parametrize(
    ("sinks", "recent", "edges"),
    [
        (1, 0, [0, 2, 4]),
        (2, 0, [0, 1, 2, 3, 4, 5]),
        (0, 1, [2, 3, 5]),
        (0, 2, [1, 2, 3, 4, 5]),
        (1, 1, [0, 2, 3, 4, 5]),
    ],
)
def test_every_document_keeps_its_edges(sinks, recent, edges):
    # 11, 5 and 8 tokens in blocks of four: the third block has the end of the first and the begin of the second
    documents = torch.tensor([[0] * 11 + [1] * 5 + [2] * 8])
    blocks = blocks_of(torch.ones(1, 24), None, documents, sinks=sinks, recent=recent)
    # the others would be taken before them
    scores = torch.ones(1, 6).index_fill(1, torch.tensor(edges), 0.0)
    assert kept_of(blocks.choose(scores, len(edges) / 6), 0)[0] == edges


def test_who_asks():
    labelled = torch.zeros(3, 12, dtype=torch.bool)
    labelled[0, 5] = labelled[2, 11] = True
    mask = torch.ones(3, 12)
    mask[1, 4:] = 0
    mask[2, 8:] = 0  # its label is padding's
    blocks = blocks_of(mask, labelled)
    exists = [[True, True, True], [True, False, False], [True, True, False]]
    assert blocks.asking("later").tolist() == blocks.exists.tolist() == exists
    assert blocks.asking("labelled").tolist() == [[False, True, False], *exists[1:]]


def test_the_published_share_of_blocks():
    """32 layers of 128 blocks: 15 keep all, 16 keep int(128 * 0.4) = 51, the last one all."""
    config = LemoConfig(keep=0.4, dense_first=15, dense_last=1)
    n = 128 * config.block
    blocks = Blocks(torch.zeros(1, n, dtype=torch.long), torch.full((1, n), IGNORE), [n], config)
    assert sum(blocks.budgets(share)[0] for share in config.shares(32)) == 2864
    assert 2864 / (32 * 128) == 0.69921875


def test_a_share_that_is_a_whole_number_of_blocks_is_that_number():
    blocks = blocks_of(torch.ones(1, 400), sinks=0, recent=0)
    assert [blocks.budgets(hundredth / 100)[0] for hundredth in range(1, 101)] == list(range(1, 101))
