import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_tokenseek.memory import LiveMemory
from tokenseek_kernels import linear_cross_entropy

KIB = 1024


def test_live_and_peak_bytes_and_the_operator_at_the_peak():
    x = torch.zeros(256)
    with LiveMemory(x) as memory:
        assert memory.bytes == memory.base_bytes == memory.peak_bytes == KIB
        assert memory.peak_op == "roots"
        y = x.exp()
        z = y.sin()
        assert memory.bytes == 3 * KIB
        del y
        w = z.view(16, 16).mul_(2)
        assert memory.bytes == 2 * KIB
        del z
        assert memory.bytes == 2 * KIB
    assert memory.peak_bytes == 3 * KIB
    assert memory.peak_op == "aten.sin.default"
    del w
    assert memory.bytes == KIB


def test_rounds_up_as_the_cuda_allocator():
    with LiveMemory() as memory:
        x = torch.ones(1)
        assert memory.bytes == 512
        y = torch.ones(129)
        assert memory.bytes == 512 + 1024
    assert x.nbytes + y.nbytes == 520


def test_a_module_stands_for_parameters_gradients_and_buffers():
    model = nn.BatchNorm1d(128)
    model.weight.grad = torch.zeros(128)
    # weight, its gradient, bias, running mean and variance, and the number of batches; the list's tensor
    assert LiveMemory(model, [{"batch": torch.zeros(128)}]).base_bytes == 7 * 512


@pytest.mark.parametrize("checkpointing", [False, True])
def test_fake_bytes_are_real_bytes(tiny_llama, checkpointing):
    def run(model, ids):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        with LiveMemory(model, ids) as memory:
            loss = model(input_ids=ids, labels=ids).loss
            figures = [memory.base_bytes, memory.bytes, memory.peak_bytes]
            loss.backward()
            figures += [memory.bytes, memory.peak_bytes, memory.peak_op]
            optimizer.step()
            figures += [memory.bytes, memory.peak_bytes]
        return figures

    ids = torch.arange(48).view(2, 24)
    real = run(tiny_llama(), ids)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = run(tiny_llama(), mode.from_tensor(ids))
    assert fake == real
    base, after_forward, peak_forward, after_backward = real[:4]
    assert base < after_forward <= peak_forward
    assert base < after_backward


def test_temporaries_inside_an_operator_are_in_the_peak():
    arguments = torch.zeros(256, 64), torch.zeros(1000, 64), torch.zeros(256, dtype=torch.long)
    peaks = []
    for inside in (False, True):
        with LiveMemory(arguments, inside=inside) as memory:
            linear_cross_entropy(*arguments)
        peaks.append(memory.peak_bytes - memory.base_bytes)
    assert peaks[0] < 2**14
    assert peaks[1] >= 256 * 1000 * 4
    assert memory.inside_bytes >= 256 * 1000 * 4
