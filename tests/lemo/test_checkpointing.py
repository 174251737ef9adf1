"""Gradient checkpointing: the same gradients, by the choice that was made in the forward pass (identity 20)."""

import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_tokenseek import attach
from hf_tokenseek.lemo.scores import Scorer
from hf_tokenseek.memory import SavedActivations
from tests.ist.tiny_ist import layers_of
from tests.lemo.deep_lemo import LAYERS, assert_same_gradients, batch, lemo_step, llama
from tests.lemo.tiny_lemo import lemo

# older versions know no other name
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing", "ignore:.*is_gradient_checkpointing")
# whether layers checkpoint in their forward, which is what we run on kept rows
INSIDE = "__call__" not in vars(GradientCheckpointingLayer)
HOW = {"plain": None, "reentrant": True, "not reentrant": False}


def checkpointed(model, reentrant: bool | None = False):
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        # as Trainer and trl do with adapters
        model.enable_input_require_grads()
    return model


def saved_bytes(model, inputs) -> int:
    with SavedActivations(model) as saved:
        loss = model(**inputs).loss
    assert loss.requires_grad
    return saved.bytes


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("mlp", ["tokens", "dense"])
@pytest.mark.parametrize("mode", ["elide", "detach"])
@pytest.mark.parametrize("score", ["pooled", "random"])
def test_gradients_are_the_same_to_the_bit(reentrant, mlp, mode, score):
    fields, inputs = {"mode": mode, "mlp": mlp, "score": score, "rescore": 1}, batch("right")
    plain = lemo_step(llama(), inputs, **fields)
    found = lemo_step(checkpointed(llama(), reentrant), inputs, **fields)
    assert torch.equal(found[0], plain[0]) and found[2] < plain[2]
    assert all(torch.equal(found[3][layer], rows) for layer, rows in plain[3].items())
    assert_same_gradients(found[1], plain[1])


@pytest.mark.parametrize("rescore", [0, 1, 2])
@pytest.mark.parametrize("reentrant", HOW.values(), ids=HOW.keys())
def test_a_layer_is_scored_once(monkeypatch, reentrant, rescore):
    scored, plain = [], Scorer.__call__

    def counting(self, layer, *args):
        scored.append(layer)
        return plain(self, layer, *args)

    monkeypatch.setattr(Scorer, "__call__", counting)
    lemo_step(checkpointed(llama(), reentrant), batch(), rescore=rescore)
    assert scored == [layer for layer in range(LAYERS) if layer % (rescore or LAYERS) == 0]


def test_what_the_forward_chose_is_computed_again_whatever_has_changed():
    """The weights that scores come from change between forward and backward: the choice would be another one."""
    found = []
    for reentrant in HOW.values():
        model, inputs = checkpointed(llama(), reentrant), batch()
        with attach(model, lemo=lemo(rescore=1, labelled=False)) as handle:
            loss = model(**inputs).loss
            handle.lemo.config.score = "recency"
            loss.backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert_same_gradients(found[1], found[0])
    assert_same_gradients(found[2], found[0])


@pytest.mark.parametrize("keep", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("reentrant", [True, False])
def test_saves_the_layers_inputs_at_the_kept_tokens(reentrant, keep):
    model, inputs = checkpointed(llama(), reentrant), batch(n=80)
    plain = saved_bytes(model, inputs)
    with attach(model, lemo=lemo(keep=keep)):
        found = saved_bytes(model, inputs)
    dropped = 2 * round((1 - keep) * 80)
    # float64 of this width; the numbers of the kept rows are shared; older versions checkpoint a layer as a whole
    less = (LAYERS * dropped * 32 - (160 - dropped if dropped else 0)) * 8
    assert plain - found == (less if INSIDE else 0)


@pytest.mark.parametrize("reentrant", HOW.values(), ids=HOW.keys())
def test_keys_and_values_of_detached_tokens_are_counted(reentrant):
    """What runs again holds them until then: two heads of eight numbers, twice, in float64."""
    model, inputs = checkpointed(llama(), reentrant), batch(n=80)
    found = []
    for mode in ("elide", "detach"):
        with attach(model, lemo=lemo(mode=mode)):
            found.append(saved_bytes(model, inputs))
    # without checkpointing those of kept tokens are saved in both modes
    more = 160 if reentrant is not None else 80
    assert found[1] - found[0] == (LAYERS * more * 2 * 2 * 8 * 8 if INSIDE or reentrant is None else 0)


def test_a_layer_that_becomes_another_class_goes_on_checkpointing():
    """FSDP2 gives a layer a class of its own after it was patched."""
    kept = []
    for changes in (False, True):
        model = checkpointed(llama())
        with attach(model, lemo=lemo()):
            for layer in layers_of(model) if changes else ():
                layer.__class__ = type("Sharded", (type(layer),), {})
            with SavedActivations(model) as saved:
                loss = model(**batch()).loss
            kept.append(saved.bytes)
            loss.backward()
    assert kept[0] == kept[1]
