import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_tokenseek import SeekConfig, attach
from hf_tokenseek.seek.batch import Sizes
from tests.seek.budgets import scored

N = 24


@pytest.mark.parametrize(
    ("score", "options"), scored([{}, {"context": 0.0}, {"ratio": 0.2}, {"labelled": 0.5, "temperature": 1.0}])
)
def test_a_whole_step_reads_nothing_back_from_the_device(tiny_llama, score, options):
    """Fake tensors have no values: whatever waits for one raises. Only the sizes are given."""
    config = SeekConfig(score=score, **options)
    sizes = Sizes.plan([N, 20], [5, 3], not options, config)
    with FakeTensorMode():
        model = tiny_llama()
        ids, mask = torch.zeros(2, N, dtype=torch.long), torch.ones(2, N, dtype=torch.long)
        with attach(model, seek=config) as handle:
            loss = model(input_ids=ids, attention_mask=mask, labels=ids, seek_sizes=sizes).loss
            loss.backward()
            assert handle.selection.shape == (2, sizes.rows)
        assert loss.shape == ()
        for parameter in model.parameters():
            assert parameter.grad.shape == parameter.shape


def test_without_sizes_labels_and_mask_are_read_once(tiny_llama, monkeypatch):
    model, reads = tiny_llama(), []
    ids = torch.zeros(2, N, dtype=torch.long)
    for name in ("item", "tolist", "nonzero", "__bool__", "__int__", "__float__"):
        original = getattr(torch.Tensor, name)

        def spy(tensor, *args, _name=name, _original=original):
            reads.append(_name)
            return _original(tensor, *args)

        monkeypatch.setattr(torch.Tensor, name, spy)
    with attach(model, seek=True):
        loss = model(input_ids=ids, labels=ids.masked_fill(torch.arange(N) < 18, -100)).loss
        read, reads[:] = list(reads), []
        loss.backward()
    assert read == ["tolist"] and reads == []
