"""What layers keep in the host's memory: the same gradients, within the budgets. Here the CPU plays the GPU."""

import gc
from dataclasses import asdict

import pytest
import torch

from hf_tokenseek import attach
from hf_tokenseek.lemo import offload as offloading
from hf_tokenseek.lemo.offload import GIB, Offload
from hf_tokenseek.memory import SavedActivations, Training
from hf_tokenseek.memory.estimation import estimate, estimate_saved_layers
from tests.ist.tiny_ist import step
from tests.lemo.deep_lemo import LAYERS, assert_same_gradients, batch, lemo_step, llama
from tests.lemo.test_checkpointing import checkpointed
from tests.lemo.test_composition import KINDS
from tests.lemo.tiny_lemo import lemo
from tests.tiny_training import arguments, trainer

PLENTY = 1.0
MODES = [{}, {"mlp": "dense"}, {"mode": "detach"}, {"score": "random", "rescore": 1}, {"dense_first": 1}]


@pytest.fixture
def on_gpu(monkeypatch):
    """Tensors of this machine count as a GPU's, however small; tells what is copied to the host, in bytes."""
    copied, to_host = [], offloading._to_host
    monkeypatch.setattr(offloading, "is_on_gpu", lambda tensor: True)
    monkeypatch.setattr(offloading, "LEAST_BYTES", 1)
    monkeypatch.setattr(offloading, "_to_host", lambda tensor: copied.append(tensor.nbytes) or to_host(tensor))
    return copied


@pytest.mark.parametrize("layout", ["whole", "left", "packed"])
@pytest.mark.parametrize("gib", [PLENTY, 2e5 / GIB, 1e3 / GIB])
@pytest.mark.parametrize("fields", MODES, ids=str)
def test_gradients_are_the_same_to_the_bit(on_gpu, fields, gib, layout):
    """Identity 21."""
    inputs = batch(layout)
    plain = lemo_step(llama(), inputs, **fields)
    assert not on_gpu
    found = lemo_step(llama(), inputs, **fields, offload_gib=gib)
    assert torch.equal(found[0], plain[0]) and on_gpu
    assert_same_gradients(found[1], plain[1])


@pytest.mark.parametrize(
    "methods", [{}, {"lean": True}, {"lean": True, "mlp_tiles": 2}, {"seek": {"context": 0.5}}], ids=str
)
def test_with_adapters_and_other_methods(on_gpu, methods):
    inputs = batch("right")
    plain = lemo_step(KINDS["lora"](), inputs, methods)
    found = lemo_step(KINDS["lora"](), inputs, methods, offload_gib=PLENTY)
    assert torch.equal(found[0], plain[0]) and on_gpu
    assert_same_gradients(found[1], plain[1])


def test_budgets_are_as_what_layers_keep():
    budgets = Offload(0.5, [1.0, 0.4, 0.4, 0.2]).budgets
    assert sum(budgets) <= 0.5 * GIB < sum(budgets) + len(budgets)
    assert budgets[0] == pytest.approx(2.5 * budgets[1]) and budgets[1] == budgets[2] == pytest.approx(2 * budgets[3])


def test_layers_move_as_much_as_their_budgets_say(on_gpu):
    with attach(model := llama(), lemo=lemo(dense_first=1, offload_gib=4e5 / GIB)) as handle:
        loss = model(**batch(n=160)).loss
        offload = handle.lemo.offload
        assert sum(offload.moved) == sum(on_gpu)
        for moved, budget in zip(offload.moved, offload.budgets, strict=True):
            # what did not fit is no larger than the largest tensor of a layer
            assert budget - max(on_gpu) < moved <= budget
        loss.backward()
        # every forward pass begins with all of it
        model(**batch(n=160))
        assert sum(offload.moved) == sum(on_gpu) / 2
    assert handle.lemo.telemetry.read()["lemo/offloaded_mib"] == pytest.approx(sum(on_gpu) / 2 / 2**20)


@pytest.mark.parametrize("gib", [PLENTY, 3e5 / GIB])
def test_what_has_moved_is_kept_no_more(on_gpu, gib):
    """What stays is counted by whoever counts, and each tensor moves once, however many operations have saved it."""
    inputs, kept = batch(n=160), []
    for own in (0.0, gib):
        with attach(model := KINDS["lora"](), lemo=lemo(offload_gib=own)), SavedActivations(model) as saved:
            loss = model(**inputs).loss
        kept.append(saved.bytes)
        loss.backward()
    assert 0 < kept[0] - kept[1] == sum(on_gpu)


def test_a_tensor_that_three_operations_save_moves_once(on_gpu):
    states = torch.randn(4, 8)
    weights = [torch.randn(8, requires_grad=True) for _ in range(4)]
    with Offload(PLENTY, [1.0]).of(0):
        shared = states * 2
        loss = sum((shared * weight).sum() for weight in weights[:3])
        assert on_gpu.count(shared.nbytes) == 1
        # written to in place it is another one
        shared += 1
        loss = loss + (shared * weights[3]).sum()
        assert on_gpu.count(shared.nbytes) == 2
    loss.backward()
    for weight, seen in zip(weights, [states * 2] * 3 + [states * 2 + 1], strict=True):
        assert torch.equal(weight.grad, seen.sum(0))


def test_backward_may_run_twice(on_gpu):
    model, found = llama(), []
    with attach(model, lemo=lemo(offload_gib=PLENTY)):
        loss = model(**batch()).loss
        for keeps in (True, False):
            model.zero_grad()
            loss.backward(retain_graph=keeps)
            found.append({name: p.grad for name, p in model.named_parameters()})
    assert_same_gradients(*found)


def test_nothing_is_held_after_the_backward_pass(on_gpu):
    with attach(model := llama(), lemo=lemo(offload_gib=PLENTY)):
        loss = model(**batch()).loss
        assert any(isinstance(held, offloading._Moved) for held in gc.get_objects())
        loss.backward()
        del loss
        gc.collect()
        assert not any(isinstance(held, offloading._Moved) for held in gc.get_objects())


def test_on_the_cpu_nothing_moves():
    with attach(model := llama(), lemo=lemo(offload_gib=PLENTY)) as handle:
        step(model, batch(n=600))
        assert handle.lemo.offload.moved == [0] * LAYERS


def simulated(seq: int, gib: float) -> Training:
    methods = {"lemo": {"keep": 0.5, "dense_first": 1, "offload_gib": gib}}
    return Training(seq=seq, device="cuda", dtype="bf16", methods=methods)


def test_simulated_layers_keep_less_by_what_moves():
    gib = 2**25 / GIB
    kept = [estimate_saved_layers(llama().config, simulated(2048, own)) for own in (0.0, gib)]
    for layer, budget in enumerate(Offload(gib, [1.0, *[0.5] * (LAYERS - 1)]).budgets):
        assert 0 < kept[0][layer] - kept[1][layer] <= budget


def test_simulated_peaks_are_the_gpus():
    with_all, moved = (estimate(llama().config, simulated(2048, own)) for own in (0.0, PLENTY))
    assert moved.saved_bytes < 0.5 * with_all.saved_bytes and moved.peak.bytes < with_all.peak.bytes


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_moves_its_own(reentrant):
    with (
        attach(model := checkpointed(llama(), reentrant), lemo=lemo(offload_gib=PLENTY)),
        pytest.raises(ValueError, match=r"offload_gib=1.0 moves what layers keep.*kwargs=\{'offload': True\}"),
    ):
        model(**batch())


def test_the_table_says_how_much_of_each_layer_moves():
    with attach(llama(), lemo=lemo(dense_first=1, offload_gib=0.01)) as handle:
        table = handle.report()
    # shares 1 and three times 0.5
    assert "up to 0.01 GiB of what they keep move to the host, 2.048 to 4.096 MiB of each" in table


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gradient_checkpointing", r"gradient_checkpointing=True.*kwargs=\{'offload': True\}"),
        ("activation_offloading", "activation_offloading=True, which moves everything"),
    ],
)
def test_arguments_that_move_activations_elsewhere_are_refused(tmp_path, name, said):
    args = arguments(tmp_path, None, lemo=asdict(lemo(offload_gib=2.0)))
    # trl's own check of it wants a GPU
    setattr(args, name, True)
    with pytest.raises(ValueError, match=f"offload_gib=2.0 does not go with {said}"):
        trainer(llama(torch.float32), args)
