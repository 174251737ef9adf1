"""What layers keep in the host's memory: the same gradients, within the budgets. Here the CPU plays the GPU."""

import gc
from dataclasses import asdict
from functools import partial

import pytest
import torch
from peft import get_peft_model
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from hf_tokenseek import attach
from hf_tokenseek.lemo import offload as offloading
from hf_tokenseek.lemo.offload import GIB, Offload
from hf_tokenseek.memory import SavedActivations, Training
from hf_tokenseek.memory.estimation import estimate, estimate_saved_layers
from tests.ist.tiny_ist import step
from tests.lemo.deep_lemo import LAYERS, assert_same_gradients, batch, lemo_step, llama
from tests.lemo.test_checkpointing import checkpointed
from tests.lemo.tiny_lemo import lemo
from tests.peft.tiny_peft import lora
from tests.tiny_training import arguments, trainer

PLENTY = 1.0
MODES = [{}, {"mlp": "dense"}, {"mode": "detach"}, {"score": "random", "rescore": 1}, {"dense_first": 1}]


def with_lora():
    return get_peft_model(llama(), lora(target_modules="all-linear"))


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
    plain = lemo_step(with_lora(), inputs, methods)
    found = lemo_step(with_lora(), inputs, methods, offload_gib=PLENTY)
    assert torch.equal(found[0], plain[0]) and on_gpu
    assert_same_gradients(found[1], plain[1])


def test_budgets_are_as_what_layers_keep(on_gpu):
    """At first as their tokens, then as the bytes of the micro-batch before: the MLP here runs on all tokens."""
    whole, fields = 4e5, {"dense_first": 1, "keep": 0.4, "mlp": "dense"}
    with attach(model := llama(), lemo=lemo(**fields, offload_gib=whole / GIB)) as handle:
        offload, kept = handle.lemo.offload, []
        assert offload.budgets == [int(whole * share / 2.2) for share in (1.0, 0.4, 0.4, 0.4)]
        for _ in range(2):
            before = offload.kept
            with SavedActivations(model) as saved:
                loss = model(**batch(n=160)).loss
            kept.append(sum(offload.kept))
            # each storage once, those that have moved, and those that have not
            assert sum(offload.moved) < kept[-1] <= saved.bytes + sum(offload.moved)
            loss.backward()
        # tables of rotations, which layers share, count once if they have moved
        assert kept[0] == pytest.approx(kept[1], rel=0.01)
        assert offload.budgets == [int(whole * own / sum(before)) for own in before]
        assert offload.budgets[1] > 0.5 * offload.budgets[0] and sum(offload.budgets) <= whole


def test_layers_move_as_much_as_their_budgets_say(on_gpu):
    with attach(model := llama(), lemo=lemo(dense_first=1, offload_gib=4e5 / GIB)) as handle:
        offload = handle.lemo.offload
        for _ in range(3):
            on_gpu.clear()
            model(**batch(n=160)).loss.backward()
            assert sum(offload.moved) == sum(on_gpu)
            for moved, budget in zip(offload.moved, offload.budgets, strict=True):
                # what did not fit is no larger than the largest tensor of a layer
                assert budget - max(on_gpu) < moved <= budget
        handle.lemo.telemetry.read()
        model(**batch(n=160)).loss.backward()
        with torch.no_grad(), handle.lemo.everywhere():
            model.eval()(**batch(n=160))
    assert handle.lemo.telemetry.read()["lemo/offloaded_mib"] == pytest.approx(sum(on_gpu) / 2 / 2**20)


def test_buffers_and_weights_stay(on_gpu):
    """They are on the GPU anyway."""
    model = llama()
    first = model.model.layers[0]
    first.register_buffer("table", torch.randn(32, dtype=torch.float64))
    first.register_forward_hook(lambda layer, args, output: output * layer.table)
    stay = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    weights, saved = {p.data_ptr() for p in model.model.layers.parameters() if p.dim() > 1}, []
    offload = Offload(PLENTY, [1.0])
    offload.begin(model)
    # what stays is handed on to the hooks outside
    outside = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t)
    with outside, offload.of(0):
        model(**batch()).loss.backward()
    assert weights | {first.table.data_ptr()} <= set(saved) <= stay


@pytest.mark.parametrize("gib", [PLENTY, 3e5 / GIB])
def test_what_has_moved_is_kept_no_more(on_gpu, gib):
    """What stays is counted by whoever counts, and each tensor moves once, however many operations have saved it."""
    inputs, kept = batch(n=160), []
    for own in (0.0, gib):
        with attach(model := with_lora(), lemo=lemo(offload_gib=own)), SavedActivations(model) as saved:
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
        assert "move to the host" in handle.report() and "nothing while the model is not on a GPU" in handle.report()
        step(model, batch(n=600))
        assert handle.lemo.offload.moved == [0] * LAYERS


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("fields", MODES, ids=str)
def test_on_a_gpu_it_is_the_same_step_with_less_memory(fields):
    inputs, found = {name: value.cuda() for name, value in batch(n=1600).items()}, []
    for gib in (0.0, PLENTY):
        with attach(model := llama().cuda(), lemo=lemo(**fields, offload_gib=gib)) as handle:
            for _ in range(3):
                model.zero_grad()
                loss = model(**inputs).loss
                held = torch.cuda.memory_allocated()
                loss.backward()
            moved = 0 if handle.lemo.offload is None else sum(handle.lemo.offload.moved)
        found.append((loss, {name: p.grad for name, p in model.named_parameters()}, held, moved))
    assert torch.equal(found[1][0], found[0][0]) and found[1][3] > 0
    assert found[0][2] - found[1][2] >= 0.9 * found[1][3]
    assert_same_gradients(found[1][1], found[0][1])


def simulated(seq: int, gib: float) -> Training:
    # a GPU's kernels, which the oldest versions do not have
    pytest.importorskip("triton")
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


def wrapped_by_fsdp(model):
    """As FSDP's own checkpointing does, which knows no flag."""
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = checkpoint_wrapper(layer)
    return model


@pytest.mark.parametrize(
    "checkpoint", [partial(checkpointed, reentrant=True), partial(checkpointed, reentrant=False), wrapped_by_fsdp]
)
def test_checkpointing_moves_its_own(checkpoint):
    with (
        attach(model := llama(), lemo=lemo(offload_gib=PLENTY)),
        pytest.raises(ValueError, match=r"offload_gib=1.0 moves what layers keep.*kwargs=\{'offload': True\}"),
    ):
        checkpoint(model)(**batch())


def test_the_table_says_how_much_of_each_layer_moves():
    with attach(llama(), lemo=lemo(dense_first=1, offload_gib=0.01)) as handle:
        table = handle.report()
    # shares 1 and three times 0.5
    assert "up to 0.01 GiB of what they keep move to the host, 2.048 to 4.096 MiB of each" in table


def test_the_table_says_what_becomes_of_attention_dropout():
    for dropout in (0.0, 0.1):
        model = llama()
        model.config.attention_dropout = dropout
        with attach(model, lemo=lemo()) as handle:
            assert ("attention dropout is off in layers that drop tokens" in handle.report()) == bool(dropout)


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
