"""Rows and their first norm in one kernel: the same step, to the bit and to the byte, wherever it is taken."""

from functools import partial

import pytest
import torch

from hf_tokenseek import attach
from hf_tokenseek.lemo import first_norm
from tests.ist.tiny_ist import layers_of
from tests.lemo.deep_lemo import LAYERS, assert_same_gradients, batch, lemo_step, llama
from tests.lemo.test_checkpointing import checkpointed
from tests.lemo.tiny_lemo import VELORA, lemo

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing", "ignore:.*is_gradient_checkpointing")


@pytest.fixture
def fused(monkeypatch):
    """The rows of every call of the kernel; `stop()` has layers take their rows and norm them one by one."""

    class Calls(list):
        def stop(self):
            monkeypatch.setattr(first_norm, "_is_known", lambda norm: False)

    calls, split = Calls(), first_norm.split_normed_rows
    monkeypatch.setattr(
        first_norm, "split_normed_rows", lambda *args, **rule: calls.append(args[1]) or split(*args, **rule)
    )
    return calls


def lean_step(model, inputs, methods=None, **fields):
    return lemo_step(model, inputs, {"lean": True, **(methods or {})}, **fields)


def assert_same_step(found, expected):
    """Loss, gradients and saved bytes."""
    assert torch.equal(found[0], expected[0]) and found[2] == expected[2]
    assert_same_gradients(found[1], expected[1])


@pytest.mark.parametrize("layout", ["whole", "left", "packed"])
@pytest.mark.parametrize("mlp", ["tokens", "dense", "neurons"])
@pytest.mark.parametrize("mode", ["elide", "detach"])
def test_is_the_same_step(fused, mode, mlp, layout):
    if (mode, mlp) == ("detach", "neurons"):
        pytest.skip("they are refused together")
    fields, frozen = {"mode": mode, "mlp": mlp, "rescore": 1}, mlp == "neurons"

    def model():
        for layer in layers_of(made := llama()):
            layer.mlp.requires_grad_(not frozen)
        return made

    found = lean_step(model(), batch(layout), **fields)
    assert [torch.equal(rows, found[3][layer]) for layer, rows in enumerate(fused)] == [True] * LAYERS
    fused.stop()
    assert_same_step(found, lean_step(model(), batch(layout), **fields))
    assert len(fused) == LAYERS


@pytest.mark.parametrize("reentrant", [True, False])
def test_beside_checkpointing(fused, reentrant):
    """A checkpoint begins with the kept rows, and norms them itself when it computes them again."""
    plain = lean_step(llama(), batch("right"))
    fused.clear()
    found = lean_step(checkpointed(llama(), reentrant), batch("right"))
    assert not fused
    assert torch.equal(found[0], plain[0])
    assert_same_gradients(found[1], plain[1])


def test_with_token_seek_when_it_scouts(fused):
    methods = {"seek": {"context": 0.5}}
    found = lean_step(llama(), batch("right"), methods)
    assert len(fused) == LAYERS
    fused.stop()
    assert_same_step(found, lean_step(llama(), batch("right"), methods))


@pytest.mark.parametrize("case", ["plain layers", "velora", "another forward", "something in front"])
def test_norms_that_somebody_else_has_an_eye_on(fused, case):
    def run():
        model = llama()
        for layer in layers_of(model):
            norm = layer.input_layernorm
            if case == "another forward":
                norm.forward = partial(type(norm).forward, norm)
            elif case == "something in front":
                norm.register_forward_pre_hook(lambda norm, args: (2 * args[0],))
        return lemo_step(
            model,
            batch("right"),
            {"velora": VELORA, "lean": True} if case == "velora" else {"lean": case != "plain layers"},
        )

    found = run()
    assert len(fused) == (LAYERS if case == "something in front" else 0)
    fused.stop()
    expected = run()
    assert torch.equal(found[0], expected[0])
    assert_same_gradients(found[1], expected[1])


def test_a_partitioned_weight_is_left_to_the_norms_own_call(fused):
    """ZeRO-3 marks it, fetches it when the module is called, and leaves nothing of it in between."""

    def partition(norm):
        whole = norm.weight.data
        norm.weight.ds_shape = whole.shape

        def fetch(*_):
            norm.weight.data = whole

        def release(*_):
            norm.weight.data = whole[:0]

        norm.register_forward_pre_hook(fetch)
        norm.register_forward_hook(release)
        release()

    def loss(partitioned):
        with attach(model := llama(), lean=True, lemo=lemo(score="random")):
            for layer in layers_of(model):
                if partitioned:
                    partition(layer.input_layernorm)
            return model(**batch("right")).loss

    found = loss(True)
    assert not fused
    assert torch.equal(found, loss(False)) and len(fused) == LAYERS
