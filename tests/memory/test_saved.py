import gc
import weakref

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from hf_tokenseek.memory import SavedActivations

KIB = 1024


def kib():
    """A leaf of 1 KiB."""
    return torch.randn(256, requires_grad=True)


def test_counts_each_storage_once():
    x = kib()
    with SavedActivations() as saved:
        # exp saves its output, which the product saves again, once through a view; the product's output is not saved
        y = x.exp()
        z = y * y.view(16, 16).view(256)
    assert saved.bytes == saved.peak_bytes == KIB
    assert saved.mib == 1 / KIB
    assert saved.tensors == 3
    assert z.shape == (256,)


def test_a_view_counts_with_its_whole_storage():
    x = torch.randn(4, 256)
    weight = kib()
    with SavedActivations() as saved:
        y = weight * x[0]
    assert saved.bytes == 4 * KIB
    assert y.shape == (256,)


def test_parameters_and_buffers_are_left_out():
    model = nn.BatchNorm1d(8).train()
    linear = nn.Linear(8, 8, bias=False)
    model.add_module("linear", linear)
    x = torch.randn(4, 8)
    with SavedActivations(model) as saved:
        y = linear(x.requires_grad_()) @ linear.weight.T
    # the two products save x and the hidden state; the weight is saved three times
    assert saved.bytes == 2 * 4 * 8 * 4
    assert y.shape == (4, 8)


def test_parameters_that_come_later_are_left_out_too():
    linear = nn.Linear(8, 8, bias=False)
    saved = SavedActivations(linear)
    linear.weight = nn.Parameter(torch.randn(8, 8))
    x = torch.randn(4, 8, requires_grad=True)
    with saved:
        y = linear(x)
    assert saved.bytes == x.nbytes
    assert y.shape == (4, 8)


def test_follows_storages_that_die_in_the_forward():
    x = kib()
    with SavedActivations() as saved:
        y = x.exp()
        assert saved.bytes == KIB
        del y
        assert saved.bytes == 0
        y = x.exp().exp()
        assert saved.bytes == saved.peak_bytes == 2 * KIB
        y = y.detach()
        # the last output is still alive, though no longer for backward: storages are followed, not graphs
        assert saved.bytes == KIB
    assert saved.peak_bytes == 2 * KIB


def test_goes_on_following_after_the_block_and_starts_again_at_zero():
    x = kib()
    saved = SavedActivations()
    with saved:
        loss = x.exp().exp().sum()
    assert saved.bytes == 2 * KIB
    loss.backward()
    assert saved.bytes == 0
    assert saved.peak_bytes == 2 * KIB
    with saved:
        assert saved.peak_bytes == saved.tensors == 0


@pytest.mark.parametrize("backward", [True, False])
def test_keeps_nothing_alive(backward):
    gc.collect()
    gc.disable()
    try:
        x = kib()
        with SavedActivations() as saved:
            # exp and softmax save their own outputs: the case in which a hook can build a cycle
            hidden = x.exp()
            loss = hidden.softmax(0).square().sum()
        storage = weakref.ref(hidden.untyped_storage())
        if backward:
            loss.backward()
        del hidden, loss
        assert storage() is None
        assert saved.bytes == 0
        counter = weakref.ref(saved)
        del saved
        assert counter() is None
    finally:
        gc.enable()


def block(x):
    return x.exp().sin().exp()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_counts_what_it_keeps(use_reentrant):
    x = kib()
    with SavedActivations() as plain:
        y = block(block(x))
    plain_bytes = plain.bytes
    with SavedActivations() as saved:
        y = x
        for _ in range(2):
            y = checkpoint(block, y, use_reentrant=use_reentrant)
    # only the inputs of the two blocks
    assert saved.bytes == 2 * KIB < plain_bytes
    y.sum().backward()
    assert x.grad.isfinite().all()


def test_nested_checkpoints():
    x = kib()

    def outer(x):
        return checkpoint(block, checkpoint(block, x, use_reentrant=False), use_reentrant=False)

    (expected,) = torch.autograd.grad(block(block(x)).sum(), x)
    with SavedActivations() as saved:
        y = checkpoint(outer, x, use_reentrant=False)
    assert saved.bytes == KIB
    (actual,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_llama_gradients_are_unchanged_and_fake_bytes_are_real_bytes(tiny_llama, checkpointing):
    def run(model, ids):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with SavedActivations(model) as saved:
            loss = model(input_ids=ids, labels=ids).loss
        figures = saved.bytes, saved.peak_bytes
        loss.backward()
        return figures, saved.bytes

    ids = torch.arange(48).view(2, 24)
    model = tiny_llama()
    model(input_ids=ids, labels=ids).loss.backward()
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    real, left = run(model, ids)
    assert left <= ids.nbytes
    torch.testing.assert_close([parameter.grad for parameter in model.parameters()], expected, rtol=0, atol=0)

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake, _ = run(tiny_llama(), mode.from_tensor(ids))
    assert fake == real
