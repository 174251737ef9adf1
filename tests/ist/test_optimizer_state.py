"""What becomes of an idle layer's optimizer state: its bytes, and the same run where it is kept."""

import pytest
import torch
from peft import get_peft_model
from transformers import Adafactor

from hf_tokenseek import attach
from hf_tokenseek.velora import VeloraAdamW
from tests.ist.tiny_ist import LAYERS, batch, deep_llama, layers_of, step
from tests.peft.tiny_peft import lora

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw for each": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "velora adamw": lambda p: VeloraAdamW(p, lr=1e-2),
    "adafactor": lambda p: Adafactor(p, lr=1e-2, relative_step=False, scale_parameter=False),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
}
STEPS, PERIOD = 16, 2


def run(state, optimizer="adamw", steps=STEPS, policy="round_robin", layers=0.34):
    """Bytes of the state after each step, and the model."""
    model = deep_llama(torch.float32)
    with attach(model, ist={"policy": policy, "layers": layers, "period": PERIOD, "state": state}) as handle:
        own = OPTIMIZERS[optimizer](model.parameters())
        handle.ist.manage(own)
        found = []
        for index in range(steps):
            handle.ist.begin_step(index)
            step(model, batch(seed=index))
            own.step()
            found.append(handle.ist.keeper.bytes())
        visited = {layer for _, active in handle.ist.history for layer in active}
    return found, model, visited, own


def dense(optimizer):
    """Bytes of the state of one layer, and of what is outside of the layers."""
    model = deep_llama(torch.float32)
    own = OPTIMIZERS[optimizer](model.parameters())
    step(model, batch())
    own.step()

    def size(parameters):
        states = [own.state[p] for p in parameters]
        return sum(t.nbytes for state in states for t in state.values() if isinstance(t, torch.Tensor))

    layer = size(layers_of(model)[0].parameters())
    return layer, size(model.parameters()) - LAYERS * layer


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_bytes_are_those_of_the_policy(optimizer):
    layer, outside = dense(optimizer)
    freed, *_ = run("free", optimizer)
    assert freed == [outside + 2 * layer] * STEPS
    kept, _, visited, _ = run("keep", optimizer)
    assert kept[0] == outside + 2 * layer and kept == sorted(kept)
    assert len(visited) == LAYERS and kept[-1] == outside + LAYERS * layer
    offloaded, *_ = run("offload", optimizer)
    assert offloaded == freed


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_offloading_trains_as_keeping_does(optimizer):
    kept, offloaded = run("keep", optimizer)[1], run("offload", optimizer)[1]
    for (name, p), q in zip(kept.named_parameters(), offloaded.parameters(), strict=True):
        assert torch.equal(p, q), name
    freed = run("free", optimizer)[1]
    assert any(not torch.equal(p, q) for p, q in zip(kept.parameters(), freed.parameters(), strict=True))


def test_undo_gives_offloaded_state_back():
    _, model, _, optimizer = run("offload")
    assert all(optimizer.state[p] for p in model.parameters())
    counts = {int(optimizer.state[p]["step"]) for p in layers_of(model)[0].parameters()}
    assert len(counts) == 1 and 0 < counts.pop() < STEPS


def test_eight_bit_states():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = get_peft_model(deep_llama(torch.float32), lora(r=64))
    with attach(model, ist={"policy": "round_robin", "layers": 0.34, "period": 1}) as handle:
        own = bitsandbytes.optim.AdamW8bit([p for p in model.parameters() if p.requires_grad], min_8bit_size=16)
        handle.ist.manage(own)
        try:
            step(model, batch())
            own.step()
        except (RuntimeError, NotImplementedError, AttributeError) as error:
            pytest.skip(f"this bitsandbytes has no 8-bit AdamW for CPUs ({error})")
        first = handle.ist.keeper.bytes()
        for index in range(1, 7):
            handle.ist.begin_step(index)
            step(model, batch(seed=index))
            own.step()
            assert handle.ist.keeper.bytes() == first
        assert len([p for p in model.parameters() if own.state.get(p)]) == 2 * 3 * 2
