"""A forward of an instance: copies, pickles and unwrapped models are plain, and chains of patches stay short."""

import copy
import inspect
import itertools
import pickle

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import extract_model_from_parallel

from hf_tokenseek import MemoryCallback, VeloraCallback, attach
from hf_tokenseek.forwarding import named_inputs
from hf_tokenseek.patched_forward import PatchedForward, leads_to, patched_by
from tests.ist.tiny_ist import step
from tests.lemo.deep_lemo import batch, llama
from tests.tiny_training import arguments, trainer

METHODS = {
    "seek": {"context": 0.3, "plain_fallback": False},
    "lemo": {"keep": 0.5, "block": 4, "dense_first": 1},
    "velora": {"groups": 4},
    "ist": {"layers": 0.5, "policy": "random"},
    "lean": True,
}


class Doubled:
    """Whose method runs in place of a forward, and doubles its argument."""

    def run(self, original, args, kwargs):
        return original(2 * args[0])


def chain(model) -> int:
    """How many functions a call of the model goes through."""
    forward, length = model.forward, 0
    while forward is not None:
        forward, length = getattr(forward, "__wrapped__", None), length + 1
    return length


def test_patches_are_taken_out_in_any_order():
    x = torch.ones(1, 3)
    for order in itertools.permutations(range(3)):
        model = torch.nn.Linear(3, 3, bias=False).train()
        plain, patches = model(x), [PatchedForward(model, Doubled().run) for _ in range(3)]
        assert torch.equal(model(x), 8 * plain) and chain(model) == 4
        for left, index in zip((4, 2, 1), order, strict=True):
            patches[index].undo()
            torch.testing.assert_close(model(x), left * plain)
            assert chain(model) == left.bit_length()
        assert "forward" not in vars(model)


def test_below_a_foreign_wrapper_a_patch_stops_doing_anything():
    model, x = torch.nn.Linear(3, 3).train(), torch.ones(1, 3)
    plain, patch = model(x), PatchedForward(model, Doubled().run)
    inner = model.forward
    model.forward = lambda *args: inner(*args)
    patch.undo()
    assert torch.equal(model(x), plain)


def test_who_runs_in_place_of_a_forward():
    model = torch.nn.Linear(3, 3)
    owner, others = Doubled(), [PatchedForward(model, Doubled().run) for _ in range(2)]
    patch = PatchedForward(model, owner.run)
    others.append(PatchedForward(model, lambda original, args, kwargs: original(*args)))
    assert all(leads_to(model.forward, own.forward) for own in (*others, patch))
    assert patched_by(model, Doubled) is owner
    assert patched_by(copy.deepcopy(model), Doubled) is None
    patch.active = False
    assert patched_by(model, Doubled) is not owner


def test_the_signature_is_that_of_the_class():
    """The Trainer reads it to know which columns of the data the model takes."""
    model = llama()
    before = inspect.signature(model.forward)
    with attach(model, seek=METHODS["seek"], lemo=METHODS["lemo"]):
        assert inspect.signature(model.forward) == before


@pytest.mark.parametrize("name", METHODS)
def test_a_copy_computes_with_its_own_weights(name):
    """TRL's reference models and averaged models are copies."""
    model, inputs = llama(), batch("whole")
    with attach(model, **{name: METHODS[name]}):
        step(model, inputs)
        copied = copy.deepcopy(model).eval()
        for parameter in copied.parameters():
            parameter.data.zero_()
        with torch.no_grad():
            assert not copied(input_ids=inputs["input_ids"]).logits.any()


@pytest.mark.parametrize("name", ["seek", "lemo", "ist"])
def test_a_copy_trains_plainly(name):
    model, inputs = llama(), batch("whole")
    expected = step(model, inputs)[1]
    with attach(model, **{name: METHODS[name]}):
        found = step(copy.deepcopy(model), inputs)[1]
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient)


def test_models_are_pickled_when_methods_are_gone():
    model, inputs = llama(), batch("whole")
    with attach(model, **METHODS):
        step(model, inputs)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(**inputs).loss, model(**inputs).loss)


def test_accelerate_unwraps_a_model_that_was_patched():
    AcceleratorState._reset_state(True)
    model, inputs = llama(torch.float32), batch("whole")
    with attach(model, seek=METHODS["seek"]):
        prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model)
        prepared(**inputs).loss.backward()
    unwrapped = extract_model_from_parallel(prepared, keep_fp32_wrapper=False)
    assert torch.isfinite(unwrapped.eval()(input_ids=inputs["input_ids"]).logits).all()
    AcceleratorState._reset_state(True)


def test_chains_do_not_grow_with_steps(tiny_llama, tmp_path):
    """Two that both want to be outermost go around each other at every step."""
    lengths = []

    class Watch(MemoryCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            super().on_step_end(args, state, control, model=model, **kwargs)
            lengths.append(chain(model))

    run = trainer(tiny_llama(), arguments(tmp_path, max_steps=6), callbacks=[VeloraCallback({"groups": 4}), Watch()])
    run.train()
    assert len(lengths) == 6 and len(set(lengths)) == 1


def test_arguments_by_name_whatever_the_rest_is_called():
    def forward(input_ids=None, labels=None, **extra): ...

    signature = inspect.signature(forward)
    assert named_inputs(signature, (1,), {"attention_mask": 2}) == {"input_ids": 1, "attention_mask": 2}

    def nameless(*inputs, labels=None): ...

    with pytest.raises(ValueError, match=r"takes \*inputs, which does not say what is what"):
        named_inputs(inspect.signature(nameless), (1,), {})
    assert named_inputs(inspect.signature(nameless), (), {"labels": 2}) == {"labels": 2}
