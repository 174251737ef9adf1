"""Attached and taken back: what evaluation sees, what is refused, and that nothing is left behind."""

import itertools

import pytest
import torch
from transformers import DynamicCache

from hf_tokenseek import attach
from tests.ist.tiny_ist import step
from tests.lemo.deep_lemo import LAYERS, assert_same_gradients, batch, kept_rows, lemo_step, llama
from tests.lemo.tiny_lemo import lemo

SEEK, VELORA = {"context": 0.3, "plain_fallback": False}, {"groups": 4, "inputs": ["attention", "down"]}
METHODS = {
    "lemo": {"lemo": lemo()},
    "ist": {"ist": {"policy": "random", "layers": 0.5}},
    "seek": {"seek": SEEK},
    "velora": {"velora": VELORA},
    "lean": {"lean": True},
}
# what goes around VeLoRA's forward, TokenSeek does, has to be there before
PAIRS = [pair for pair in itertools.permutations(("ist", "seek", "velora", "lean"), 2) if pair != ("velora", "seek")]


def looks(model) -> tuple:
    """What attaching could have touched; a forward of its own is what an instance has while it is patched."""
    modules = [(name, type(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()]
    asks = [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]
    return model.config._attn_implementation, modules, asks


def patched(model) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize("fields", [{}, {"mlp": "dense"}, {"mode": "detach"}], ids=str)
def test_undo_gives_everything_back(fields):
    model, inputs = llama(), batch()
    before, plain = looks(model), step(model, inputs)
    with attach(model, lemo=lemo(**fields)) as handle:
        step(model, inputs)
        assert looks(model) != before and len(patched(model)) == LAYERS + 1
    handle.undo()  # a second time changes nothing
    assert looks(model) == before and not patched(model)
    again = step(model, inputs)
    assert torch.equal(again[0], plain[0]) and again[2] == plain[2]
    assert_same_gradients(again[1], plain[1])


@pytest.mark.parametrize("order", itertools.permutations(range(3)), ids=str)
@pytest.mark.parametrize("others", PAIRS, ids="-".join)
def test_undone_in_any_order(others, order):
    model, inputs = llama(), batch()
    before, plain = looks(model), step(model, inputs)
    handles = [attach(model, **METHODS[name]) for name in (*others, "lemo")]
    step(model, inputs)
    for index in order:
        handles[index].undo()
    again = step(model, inputs)
    assert torch.equal(again[0], plain[0]) and again[2] == plain[2]
    assert_same_gradients(again[1], plain[1])
    assert looks(model) == before


@pytest.mark.parametrize("fields", [{}, {"mode": "detach"}, {"mlp": "dense"}], ids=str)
def test_evaluation_and_generation_see_the_original(fields):
    model, inputs = llama(), batch("left")
    prompt = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    found = []
    for methods in ({}, {"lemo": lemo(**fields)}):
        with attach(model, lean=True, **methods):
            model.eval()
            with torch.no_grad():
                found.append((model(**inputs).logits, model.generate(**prompt, max_new_tokens=4, do_sample=False)))
            model.train()
            with torch.no_grad():
                found[-1] += (model(**inputs).logits,)
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_layers_that_keep_different_tokens_share_no_cache():
    model, inputs = llama(), batch()
    model.config.use_cache = True
    assert model(**inputs).past_key_values is not None
    with attach(model, lemo=lemo(rescore=1)) as handle:
        assert model(**inputs).past_key_values is None
        model.eval()
        with torch.no_grad(), handle.lemo.everywhere():
            assert model(**inputs).past_key_values is None


def test_sparse_evaluation():
    """What the sparse model is worth: the loss that training sees."""
    model, inputs = llama(), batch("right")
    plain = model(**inputs).loss
    with attach(model, lemo=lemo(score="oracle", rescore=1)) as handle:
        trained = model(**inputs).loss
        rows = kept_rows(handle)
        model.eval()
        with torch.no_grad(), handle.lemo.everywhere():
            assert torch.equal(model(**inputs).loss, trained)
            assert all(torch.equal(kept, rows[layer]) for layer, kept in kept_rows(handle).items())
            # it needs no labels
            assert model(input_ids=inputs["input_ids"]).logits.shape == (2, 42, 128)
        with torch.no_grad():
            assert torch.equal(model(**inputs).loss, plain)
    assert trained != plain


@pytest.mark.parametrize("methods", [{}, {"seek": {"context": 0.5}}], ids=str)
def test_sparse_evaluation_in_training_mode_is_the_sparse_models_too(methods):
    """Without gradients TokenSeek computes no loss; labels of dropped tokens count no more than ever."""
    model, inputs = llama(), batch("right")
    with attach(model, lemo=lemo()):
        trained = model(**inputs).loss
    with attach(model, lemo=lemo(), **methods) as handle, torch.no_grad(), handle.lemo.everywhere():
        torch.testing.assert_close(model(**inputs).loss, trained.detach(), rtol=1e-6, atol=0)


def test_figures_are_of_training():
    """Sequences of another length keep another share of their blocks."""
    model, inputs = llama(), batch()
    fields = {"keep": 0.3, "sinks": 0, "recent": 1, "probe_steps": 1}
    with attach(model, lemo=lemo(**fields)) as handle:
        model(**inputs)
        expected = handle.lemo.telemetry.read()
        assert "lemo/recall" in expected
        model(**inputs)
        with torch.no_grad(), handle.lemo.everywhere():
            model(**batch(n=9))
        model.eval()
        with torch.no_grad(), handle.lemo.everywhere():
            model(**batch(n=9))
        assert handle.lemo.telemetry.read().keys() == {"lemo/kept_share"}
        model.train()
        handle.lemo.begin_step(0)
        model(**inputs)
        assert handle.lemo.telemetry.read() == pytest.approx(expected)


def test_layers_on_several_devices_are_refused():
    model = llama()
    model.hf_device_map = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "lm_head": "cpu"}
    for methods in ({"lemo": lemo()}, {"seek": True}):
        with pytest.raises(ValueError, match=r"is spread over \[0, 1, 'cpu'\] .device_map.*device_map=\{'': 0\}"):
            attach(model, **methods)
    model.hf_device_map = {"": 0}
    attach(model, lemo=lemo(), seek=True).undo()


def test_attaching_twice_is_refused_until_undone():
    model = llama()
    with attach(model, lemo=True):
        for _ in range(2):
            with pytest.raises(ValueError, match=r"LeMo is attached to this model already.*undo\(\)"):
                attach(model, lemo=True)
    with attach(model, lemo=True):
        pass


def test_a_backbone_that_trains_past_lemo_is_stopped():
    model, inputs = llama(), batch()
    with attach(model, lemo=lemo()):
        with pytest.raises(ValueError, match="was about to train without LeMo"):
            model.model(input_ids=inputs["input_ids"])
        model.eval()
        assert model.model(input_ids=inputs["input_ids"])[0].requires_grad


def test_a_model_that_is_too_shallow_is_left_alone():
    model = llama(layers=2)
    before = looks(model)
    with pytest.raises(ValueError, match="leave none of 2 layers"):
        attach(model, lemo=True)
    assert looks(model) == before and not patched(model)


def test_the_report_says_what_runs_where():
    model, inputs = llama(), batch()
    fields = {"dense_first": 1, "dense_last": 1, "score": "recency"}
    with attach(model, lemo=lemo(**fields)) as handle:
        step(model, inputs)
        said = handle.report().splitlines()
    assert "LeMo on LlamaForCausalLM: keep=0.5, block=4, score=recency" in said[0]
    assert [" ".join(line.split()) for line in said[1:4]] == [
        "layers 0 to 0 run on all tokens",
        "layers 1 to 2 run on 0.5 of the blocks",
        "layers 3 to 3 run on all tokens",
    ]
    # 5 of 11 blocks, the last of which has two tokens
    assert said[-1].split() == ["lemo/kept_share", "0.4286"]
    assert handle.lemo.kept_blocks[0] == [2] * 11 and handle.lemo.kept_blocks[1] == [2] + [0] * 6 + [2] * 4


def test_random_choices_follow_from_seed_step_and_micro_step():
    model, inputs = llama(), batch()
    with attach(model, lemo=lemo(score="random", rescore=1, labelled=False)) as handle:
        found = []
        for number in (0, 0, 1, 1):
            handle.begin_step(number)
            model(**inputs), found.append(kept_rows(handle)[1])
        model(**inputs), found.append(kept_rows(handle)[1])
    assert torch.equal(found[0], found[1]) and torch.equal(found[2], found[3])
    assert not torch.equal(found[0], found[2]) and not torch.equal(found[3], found[4])
    other = lemo_step(model, inputs, score="random", rescore=1, labelled=False, seed=1)[3]
    assert not torch.equal(other[1], found[0]) and len(other) == LAYERS


def test_a_cache_is_refused():
    """Every layer keeps other tokens; `generate()` of the sparse model goes without."""
    model, inputs = llama(), batch("whole")
    with attach(model, lemo=lemo()) as handle:
        with pytest.raises(ValueError, match="got a cache of all .past_key_values"):
            model(**inputs, past_key_values=DynamicCache())
        model.eval()
        with handle.lemo.everywhere():
            with pytest.raises(ValueError, match="use_cache=False"):
                model.generate(inputs["input_ids"], max_new_tokens=2, use_cache=True, pad_token_id=0)
            sparse = model.generate(inputs["input_ids"], max_new_tokens=2, use_cache=False, pad_token_id=0)
    assert sparse.shape[1] == inputs["input_ids"].shape[1] + 2


def test_figures_of_layers_where_these_differ():
    model = llama()
    own = [0.25 + 0.125 * layer for layer in range(LAYERS)]
    with attach(model, lemo=lemo(keep=own, sinks=0, recent=0, labelled=False)) as handle:
        for _ in range(3):
            step(model, batch("whole"))
        figures = handle.lemo.telemetry.read()
    shares = [figures[f"lemo/kept_share/layer_{layer}"] for layer in range(LAYERS)]
    assert shares == sorted(shares) and len(set(shares)) == LAYERS
    assert figures["lemo/kept_share"] == pytest.approx(sum(shares) / LAYERS)
    assert handle.lemo.telemetry.read() == {}
