import pytest
import torch

from hf_tokenseek import SeekConfig
from hf_tokenseek.seek.batch import IGNORE, prepare
from hf_tokenseek.seek.metrics import Trained
from hf_tokenseek.seek.scores import Scouted
from hf_tokenseek.seek.select import DITCHED, EVIDENCE, LOSS, select
from hf_tokenseek.seek.watch import PositionHistogram, SampleWatch, fingerprints

SEQUENCES = [list(range(start, start + length)) for start, length in ((1, 9), (20, 7), (40, 5), (60, 9), (80, 6))]
CONFIG = SeekConfig(context=0.3)


def micro_batch(numbers, left=False, width=None, plainly=False):
    """The named sequences, of which the last two tokens are labels; the score of a token is its id."""
    rows = [SEQUENCES[number] for number in numbers]
    width = width or max(map(len, rows))

    def padded(row, fill):
        free = [fill] * (width - len(row))
        return free + row if left else row + free

    ids = torch.tensor([padded(row, 0) for row in rows])
    labels = torch.tensor([padded([-100] * (len(row) - 2) + row[-2:], -100) for row in rows])
    batch = prepare(CONFIG, ids, labels, torch.tensor([padded([1] * len(row), 0) for row in rows]))
    scores = ids.float()
    selection = select(scores, batch, CONFIG)
    if plainly:
        return batch, Trained(torch.tensor(0.0), selection, plainly=True)
    return batch, Trained(torch.tensor(0.0), selection, Scouted(mass=scores / 10), scores)


def by_hand(sequence):
    """Rows before the two labels carry the loss; of the others the 30 percent with the largest ids are evidence."""
    free = [place for place in range(len(sequence)) if place not in (len(sequence) - 3, len(sequence) - 2)]
    evidence = free[-(-3 * len(free) // 10) * -1 :]
    kinds = [DITCHED] * len(sequence)
    for place in evidence:
        kinds[place] = EVIDENCE
    kinds[-3] = kinds[-2] = LOSS
    return kinds


@pytest.mark.parametrize("left", [False, True])
def test_a_visit_has_the_tokens_their_kinds_scores_and_terms_without_padding(left):
    watch = SampleWatch(3)
    watch.observe(*micro_batch([0, 1], left, width=12), step=5)
    watch.observe(*micro_batch([2, 3], left), step=6)
    visits = watch.read()
    # the fourth sequence found no place
    assert [visit.tokens for visit in visits] == SEQUENCES[:3]
    assert [visit.step for visit in visits] == [5, 5, 6]
    for visit in visits:
        assert visit.kinds == by_hand(visit.tokens)
        assert visit.scores == [float(token) for token in visit.tokens]
        assert visit.terms == {"attention mass": pytest.approx([token / 10 for token in visit.tokens])}
    assert watch.read() == []


def test_a_sequence_is_known_again_whatever_its_padding_and_place():
    watch = SampleWatch(2)
    watch.observe(*micro_batch([0, 1]), step=1)
    assert len(watch.read()) == 2
    watch.observe(*micro_batch([4, 1, 3], left=True, width=15), step=2)
    (visit,) = watch.read()
    assert (visit.step, visit.tokens, visit.kinds) == (2, SEQUENCES[1], by_hand(SEQUENCES[1]))
    # the latest of two visits between readings
    watch.observe(*micro_batch([0]), step=3)
    watch.observe(*micro_batch([0, 2]), step=4)
    assert [(v.step, v.tokens) for v in watch.read()] == [(4, SEQUENCES[0])]


def test_sequences_that_come_back_before_all_places_are_taken_count_once():
    watch = SampleWatch(8)
    for step in (1, 2):
        watch.observe(*micro_batch([0, 1]), step=step)
    assert [visit.tokens for visit in watch.read()] == SEQUENCES[:2]


def test_known_sequences_are_followed_from_the_beginning():
    watch = SampleWatch(2, known=[SEQUENCES[3], SEQUENCES[1]])
    watch.observe(*micro_batch([0, 1, 2, 3]), step=9)
    assert [visit.tokens for visit in watch.read()] == [SEQUENCES[3], SEQUENCES[1]]


def test_what_was_trained_plainly_has_no_scores():
    watch = SampleWatch(2)
    watch.observe(*micro_batch([0], plainly=True), step=1)
    watch.observe(*micro_batch([1]), step=2)
    first, second = watch.read()
    assert (first.step, first.scores, first.terms) == (1, None, {})
    assert second.scores == [float(token) for token in SEQUENCES[1]]


def test_embeddings_are_passed_over():
    batch, done = micro_batch([0])
    batch.tokens = torch.zeros(1, 9, 4)
    watch = SampleWatch(2)
    watch.observe(batch, done, step=1)
    assert watch.read() == []


def test_fingerprints_tell_order_and_ids_but_not_padding():
    tokens = torch.tensor([[5, 6, 7, 0], [5, 6, 7, 9], [6, 5, 7, 0], [5, 6, 8, 0], [5, 6, 7, 0]])
    real = torch.tensor([[1, 1, 1, 0]] * 4 + [[1, 1, 1, 1]]).bool()
    first, padded_otherwise, swapped, other, longer = fingerprints(tokens, real).tolist()
    assert first == padded_otherwise
    assert len({first, swapped, other, longer}) == 4
    # and a wider batch changes nothing
    wide = torch.nn.functional.pad(tokens[:1], (0, 5)), torch.nn.functional.pad(real[:1], (0, 5))
    assert fingerprints(*wide).tolist() == [first]


@pytest.mark.parametrize("bins", [3, 20])
def test_histogram_counts_every_real_token_once_at_its_place(bins):
    histogram = PositionHistogram(bins)
    expected = {"ditched": [0] * bins, "evidence": [0] * bins, "loss": [0] * bins}
    for numbers, left in (([0, 1], False), ([2, 3, 4], True)):
        batch, done = micro_batch(numbers, left)
        histogram.observe(batch, done)
        for number in numbers:
            sequence = SEQUENCES[number]
            for place, kind in enumerate(by_hand(sequence)):
                expected[("ditched", "evidence", "loss")[kind]][place * bins // len(sequence)] += 1
    counts = histogram.read()
    assert counts == expected
    assert sum(map(sum, counts.values())) == sum(map(len, SEQUENCES))
    assert histogram.read() is None


def test_histogram_leaves_out_what_was_trained_plainly():
    histogram = PositionHistogram()
    histogram.observe(*micro_batch([0], plainly=True))
    assert histogram.read() is None


def test_kinds_of_a_selection_with_empty_slots():
    batch, done = micro_batch([0, 2])
    kinds = done.selection.kinds(9)
    assert kinds.tolist() == [by_hand(SEQUENCES[0]), by_hand(SEQUENCES[2]) + [DITCHED] * 4]
    assert (kinds == LOSS).sum() == (batch.targets != IGNORE).sum()
