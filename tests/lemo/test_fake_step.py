"""A step reads nothing back from the device but the counts of real and labelled tokens."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_tokenseek import attach
from hf_tokenseek.seek.batch import Sizes, known_counts
from tests.lemo.deep_lemo import batch
from tests.lemo.tiny_lemo import BLOCK, lemo

N, SHORT, LAYERS = 42, 31, 3
FIELDS = {
    "pooled": {},
    "oracle": {"score": "oracle", "rescore": 1, "rope": True},
    "random": {"score": "random", "rescore": 2},
    "recency": {"score": "recency"},
    "thresholds": {"thresholds": [1.0] * LAYERS, "bounds": [0.2, 0.5]},
    "detach": {"mode": "detach"},
    "dense": {"mlp": "dense"},
    "probed": {"probe_steps": 1},
}


@pytest.mark.parametrize("simple", [True, False], ids=["simple", "packed"])
@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS.keys())
def test_fake_tensors_hold_nothing_that_could_be_read(tiny_llama, fields, simple):
    with FakeTensorMode():
        model = tiny_llama()
        ids, mask = torch.zeros(2, N, dtype=torch.long), torch.ones(2, N, dtype=torch.long)
        with attach(model, lemo=lemo(**fields)) as handle, known_counts([N, SHORT], [20, 9], simple):
            model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
            kept = handle.lemo.elimination.kept
        assert [choice.rows.shape for choice in kept.values()] == [(2, 5 * BLOCK)] * LAYERS
        assert all(parameter.grad.shape == parameter.shape for parameter in model.parameters())


def test_with_seek(tiny_llama):
    config = {"context": 0.2, "plain_fallback": False}
    with FakeTensorMode():
        model, ids = tiny_llama(), torch.zeros(2, N, dtype=torch.long)
        with attach(model, seek=config, lemo=lemo()) as handle, known_counts([N, SHORT], [6, 9]):
            model(input_ids=ids, labels=ids).loss.backward()
            sizes = Sizes.plan([N, SHORT], [6, 9], True, handle.seek.config)
            assert handle.selection.shape == (2, sizes.rows)


@pytest.mark.parametrize("seek", [None, {"context": 0.2, "plain_fallback": False}], ids=["alone", "seek"])
@pytest.mark.parametrize("fields", [fields for fields in FIELDS.values() if "mode" not in fields], ids=str)
def test_counts_are_all_that_is_read(monkeypatch, tiny_llama, fields, seek):
    model, inputs, reads = tiny_llama(), batch(), []
    for name in ("item", "tolist", "nonzero", "__bool__", "__int__", "__float__"):
        original = getattr(torch.Tensor, name)

        def spy(tensor, *args, _name=name, _original=original):
            reads.append(_name)
            return _original(tensor, *args)

        monkeypatch.setattr(torch.Tensor, name, spy)
    model(**inputs).loss.backward()
    # the plain model reads, too: whether there is a mask to build
    plain, reads[:] = list(reads), []
    with attach(model, seek=seek, lemo=lemo(**fields)):
        loss = model(**inputs).loss
        read, reads[:] = list(reads), []
        loss.backward()
    assert read == ["tolist", *plain] if seek is None else read == ["tolist", "tolist"]
    assert reads == []
