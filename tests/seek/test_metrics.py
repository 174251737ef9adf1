import pytest
import torch

from hf_tokenseek import SeekConfig
from hf_tokenseek.seek.batch import prepare
from hf_tokenseek.seek.cost import Cost
from hf_tokenseek.seek.metrics import SeekMetrics, Trained
from hf_tokenseek.seek.scores import Scouted
from hf_tokenseek.seek.select import Selection

N = 11


def observe(metrics, plainly=False, mass=True):
    """
    Two sequences, the second with a token of padding at its end. Labels are predicted at 8 and 9, and at 8; evidence
    are the rows 2 and 5, and 0.
    """
    ids, mask = torch.zeros(2, N, dtype=torch.long), torch.ones(2, N, dtype=torch.long)
    mask[1, 10] = 0
    labels = torch.full((2, N), -100)
    labels[0, 9:], labels[1, 9] = 1, 1
    batch = prepare(SeekConfig(), ids, labels, mask)
    batch.sizes.evidence = [2, 1]
    rows = torch.tensor([[2, 5, 8, 9], [0, 8, -1, -1]])
    received = torch.arange(1.0, 2 * N + 1).view(2, N) if mass else None
    selection = Selection(rows, torch.zeros_like(rows), torch.ones(rows.shape))
    metrics.observe(batch, Trained(torch.tensor(1.0), selection, Scouted(received), None, 1024, plainly), Cost(3.0))


def test_figures_of_one_micro_batch():
    metrics = SeekMetrics()
    observe(metrics)
    found = metrics.read()
    assert found["seek/selected_share"] == pytest.approx(4 / 11)
    assert found["seek/labelled_share"] == pytest.approx(3 / 21)
    assert found["seek/plain_share"] == 0
    # evidence at 2, 5 and 0, out of 10 steps from the first to the last position
    assert found["seek/mean_position"] == pytest.approx((0.2 + 0.5 + 0.0) / 3)
    # mass counts up from 1 to 22, place by place; 9, 10 and 20 are labelled, 22 is padding
    kept, unlabelled = 3 + 6 + 12, sum(range(1, 22)) - 9 - 10 - 20
    assert found["seek/evidence_mass"] == pytest.approx(kept / unlabelled)


def test_means_since_the_last_reading():
    metrics = SeekMetrics()
    observe(metrics)
    observe(metrics, plainly=True)
    assert metrics.read(reset=False) == metrics.read()
    observe(metrics, plainly=True)
    assert metrics.read() == {
        "seek/selected_share": 1.0,
        "seek/labelled_share": pytest.approx(3 / 21),
        "seek/plain_share": 1.0,
    }
    assert metrics.read() == {}
    metrics.probe({"gradient_cosine": 0.5})
    metrics.probe({"gradient_cosine": 1.0})
    assert metrics.read() == {"seek/gradient_cosine": 0.75}


def test_a_score_without_mass_has_no_evidence_mass():
    metrics = SeekMetrics()
    observe(metrics, mass=False)
    assert "seek/evidence_mass" not in metrics.read()


def test_misfit_needs_ten_micro_batches_and_a_plain_majority():
    metrics = SeekMetrics()
    for _ in range(5):
        observe(metrics)
    for plain in range(5):
        assert metrics.misfit() is None
        observe(metrics, plainly=True)
        assert metrics.total == 6 + plain
    assert metrics.misfit() is None  # five of ten
    observe(metrics, plainly=True)
    assert "6 of 11 micro-batches" in metrics.misfit() and "gradient checkpointing" in metrics.misfit()


def test_description():
    metrics = SeekMetrics()
    assert metrics.describe() == []
    observe(metrics)
    text = "\n".join(metrics.describe())
    assert "k/n = 4/11 = 36.4%" in text
    assert "2.09 forwards predicted, plain 3.00" in text and "67%" in text
