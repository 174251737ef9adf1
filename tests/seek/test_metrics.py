import pytest
import torch

from hf_tokenseek import SeekConfig
from hf_tokenseek.seek.batch import prepare
from hf_tokenseek.seek.cost import Cost
from hf_tokenseek.seek.metrics import SeekMetrics, Trained
from hf_tokenseek.seek.scores import Scouted
from hf_tokenseek.seek.select import Selection

N = 11


def observe(metrics, plainly=False, mass=True, evidence=True):
    """
    Two sequences, the second with a token of padding at its end. Labels are predicted at 8 and 9, and at 8; evidence
    are the rows 2 and 5, and 0, or none.
    """
    ids, mask = torch.zeros(2, N, dtype=torch.long), torch.ones(2, N, dtype=torch.long)
    mask[1, 10] = 0
    labels = torch.full((2, N), -100)
    labels[0, 9:], labels[1, 9] = 1, 1
    batch = prepare(SeekConfig(), ids, labels, mask)
    batch.sizes.evidence = [2, 1]
    rows = torch.tensor([[2, 5, 8, 9], [0, 8, -1, -1]] if evidence else [[8, 9], [8, -1]])
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


@pytest.mark.parametrize("padding", [(0, 0), (0, 30), (30, 0), (7, 5)], ids=str)
def test_places_are_those_among_real_tokens(padding):
    """Rows 2 and 5 of 11 tokens, wherever padding stands."""
    left, right = padding
    ids = torch.zeros(1, N, dtype=torch.long)
    labels = torch.full((1, N), -100)
    labels[0, 9] = 1
    tokens, mask, labels = (
        torch.nn.functional.pad(part, padding, value=fill)
        for part, fill in ((ids, 0), (torch.ones_like(ids), 0), (labels, -100))
    )
    batch = prepare(SeekConfig(), tokens, labels, mask)
    rows = torch.tensor([[2, 5, 8]]) + left
    metrics, selection = SeekMetrics(), Selection(rows, batch.targets.gather(1, rows), torch.ones(1, 3))
    metrics.observe(batch, Trained(torch.tensor(1.0), selection), Cost(3.0))
    assert metrics.read()["seek/mean_position"] == pytest.approx((0.2 + 0.5) / 2)


def test_no_place_where_there_is_no_evidence():
    """Such micro-batches neither count as the first place nor spoil the others."""
    metrics = SeekMetrics()
    observe(metrics, evidence=False)
    assert "seek/mean_position" not in metrics.read(reset=False)
    observe(metrics)
    assert metrics.read()["seek/mean_position"] == pytest.approx((0.2 + 0.5 + 0.0) / 3)


def test_misfit_is_a_plain_majority():
    metrics = SeekMetrics()
    assert metrics.misfit() is None
    for _ in range(5):
        observe(metrics)
    for _ in range(5):
        assert metrics.misfit() is None
        observe(metrics, plainly=True)
    assert metrics.misfit() is None  # five of ten
    assert "does not fit" not in "\n".join(metrics.describe())
    observe(metrics, plainly=True)
    assert "6 of 11 micro-batches" in metrics.misfit() and "gradient checkpointing" in metrics.misfit()
    assert metrics.describe()[-1] == metrics.misfit()


def test_description():
    metrics = SeekMetrics()
    assert metrics.describe() == []
    observe(metrics)
    text = "\n".join(metrics.describe())
    assert "k/n = 4/11 = 36.4%" in text
    assert "2.09 forwards predicted, plain 3.00" in text and "67%" in text
