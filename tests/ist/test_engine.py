"""The engine: what idle layers cost, that active ones train as ever, and that everything is given back."""

import copy
import itertools

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_tokenseek import attach
from tests.ist.tiny_ist import (
    LAYERS,
    assert_same_step,
    batch,
    deep_llama,
    frozen_step,
    gated_step,
    layers_of,
    set_active,
    step,
)
from tests.peft.tiny_peft import lora

# older versions know no other name
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing", "ignore:.*is_gradient_checkpointing")

ACTIVE = [[LAYERS - 1], [0], [2, 4], [0, 1, 5], list(range(LAYERS))]
KINDS = {
    "full": deep_llama,
    "embeddings frozen": lambda: freeze_embeddings(deep_llama()),
    "lora": lambda: get_peft_model(deep_llama(), lora(lora_dropout=0.0)),
    "dora": lambda: get_peft_model(deep_llama(), lora(use_dora=True)),
}
SEEK, VELORA = {"context": 0.3, "plain_fallback": False}, {"groups": 4, "inputs": ["attention", "down"]}
MODES = {
    "seek": {"seek": SEEK},
    "lean": {"lean": True},
    "velora": {"velora": VELORA},
    "all": {"seek": SEEK, "lean": True, "velora": VELORA},
}


def freeze_embeddings(model):
    model.model.embed_tokens.requires_grad_(False)
    return model


@pytest.mark.parametrize("active", ACTIVE, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_that_of_a_model_whose_other_layers_are_really_frozen(kind, active):
    assert_same_step(gated_step(KINDS[kind](), batch(), active), frozen_step(KINDS[kind](), batch(), active))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["full", "embeddings frozen", "lora"])
def test_together_with_the_other_methods(kind, mode):
    mine = gated_step(KINDS[kind](), batch(), [2, 4], **MODES[mode])
    assert_same_step(mine, frozen_step(KINDS[kind](), batch(), [2, 4], **MODES[mode]))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["full", "embeddings frozen", "lora"])
def test_gradient_checkpointing(kind, reentrant):
    def checkpointed():
        model = KINDS[kind]()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        # as Trainer and trl do with adapters
        model.enable_input_require_grads()
        return model

    mine, plain = gated_step(checkpointed(), batch(), [2, 4]), gated_step(KINDS[kind](), batch(), [2, 4])
    assert torch.equal(mine[0], plain[0]) and mine[1].keys() == plain[1].keys()
    for name, grad in mine[1].items():
        assert torch.equal(grad, plain[1][name]), name


def test_layers_that_become_another_class_go_on_checkpointing():
    """FSDP2 gives a layer a class of its own after it was patched."""
    saved = []
    for changes in (False, True):
        model = deep_llama()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        with attach(model, ist={"policy": "random"}) as handle:
            set_active(handle.ist, [0, 4])
            for layer in layers_of(model) if changes else ():
                layer.__class__ = type("Sharded", (type(layer),), {})
            saved.append(step(model, batch()))
    assert_same_step(*saved)


def test_nothing_is_saved_below_the_lowest_active_layer_even_where_inputs_ask_for_a_gradient():
    model = KINDS["lora"]()
    plain = gated_step(model, batch(), [LAYERS - 1])[2]
    model.enable_input_require_grads()
    assert gated_step(model, batch(), [LAYERS - 1])[2] == plain
    one = get_peft_model(deep_llama(layers=1), lora())
    assert plain == gated_step(one, batch(), [0])[2]


def test_saved_bytes_are_those_of_frozen_layers_from_the_lowest_on_and_of_active_adapters():
    model = KINDS["lora"]()
    subsets = [active for size in (1, 2, 3) for active in itertools.combinations(range(LAYERS), size)]
    saved = {active: gated_step(model, batch(), active)[2] for active in subsets}
    # what one more frozen layer above the lowest, and one more layer's adapters, keep
    layer, own = saved[0,] - saved[1,], saved[0, 1] - saved[0,]
    assert layer > 0 and own > 0
    for active, mib in saved.items():
        expected = saved[LAYERS - 1,] + layer * (LAYERS - 1 - active[0]) + own * (len(active) - 1)
        assert mib == pytest.approx(expected, rel=1e-9), active


def test_what_the_adapters_of_an_active_layer_save_is_counted_by_hand():
    model = get_peft_model(deep_llama(), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["down_proj"]))
    inputs = batch()
    saved = [gated_step(model, inputs, active)[2] for active in ([0, 3], [0])]
    # the input of A, 48 wide, and the 4 numbers a token that B reads, in float64
    assert (saved[0] - saved[1]) * 2**20 == inputs["input_ids"].numel() * (48 + 4) * 8


def test_as_many_layers_as_there_are_train_plainly_to_the_bit():
    plain, own = deep_llama(), deep_llama()
    with attach(own, ist={"layers": 1.0, "period": 2}) as handle:
        for model in (plain, own):
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
            if model is own:
                handle.ist.manage(optimizer)
            for index in range(5):
                if model is own:
                    handle.ist.begin_step(index)
                step(model, batch(seed=index))
                optimizer.step()
    assert_same_step(step(plain, batch()), step(own, batch()))


def test_idle_layers_do_not_move_and_their_steps_are_not_counted():
    model = deep_llama()
    with attach(model, ist={"policy": "random", "period": 3, "state": "keep"}) as handle:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
        handle.ist.manage(optimizer)
        trained = [0] * LAYERS
        for index in range(12):
            handle.ist.begin_step(index)
            before = copy.deepcopy(model.state_dict())
            step(model, batch(seed=index))
            optimizer.step()
            active = handle.ist.active
            for layer in active:
                trained[layer] += 1
            for name, value in model.state_dict().items():
                inside = name.startswith("model.layers.")
                idle = inside and int(name.split(".")[2]) not in active
                assert torch.equal(value, before[name]) == idle, name
        for layer, count in zip(layers_of(model), trained, strict=True):
            states = [optimizer.state[parameter] for parameter in layer.parameters()]
            assert {int(state["step"]) if state else 0 for state in states} == {count}
    assert len({tuple(active) for _, active in handle.ist.history}) > 1


def test_requires_grad_looks_the_same_from_outside_whatever_happens():
    model = deep_llama()
    wish = {name: p.requires_grad for name, p in model.named_parameters()}
    with attach(model, ist={"policy": "random"}) as handle:
        set_active(handle.ist, [3])
        model(**batch()).loss.backward()
        assert wish == {name: p.requires_grad for name, p in model.named_parameters()}
        hook = layers_of(model)[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**batch())
        hook.remove()
        assert wish == {name: p.requires_grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("embeddings", [True, False])
def test_undo_gives_everything_back(embeddings):
    model, plain = deep_llama(), step(deep_llama(), batch())
    forwards = [layer.forward for layer in layers_of(model)]
    with attach(model, ist={"embeddings": embeddings}):
        assert model.model.embed_tokens.weight.requires_grad == embeddings
        assert model.model.norm.weight.requires_grad == embeddings
    assert forwards == [layer.forward for layer in layers_of(model)]
    assert not model._forward_pre_hooks
    assert_same_step(step(model, batch()), plain)


def test_lisa_trains_embeddings_head_norm_and_so_many_layers():
    model = deep_llama()
    with attach(model, ist={"policy": "lisa", "layers": 0.34}) as handle:
        _, gradients, _ = step(model, batch())
        layer = sum(p.numel() for p in layers_of(model)[0].parameters())
        outside = sum(p.numel() for p in model.parameters()) - LAYERS * layer
        assert sum(grad.numel() for grad in gradients.values()) == outside + 2 * layer
        assert handle.ist.trained_bytes() == 8 * (outside + 2 * layer)


def test_unbiased_divides_the_gradients_of_a_layer_by_its_chance():
    model = deep_llama()
    _, full, _ = step(model, batch())
    with attach(model, ist={"policy": "ist", "layers": 0.5, "unbiased": True, "period": 1}) as handle:
        handle.ist.policy.importance.values = [-2.0, -1.0, 0.0, 0.5, 1.0, 2.0]
        handle.ist.begin_step(1)
        _, gradients, _ = step(model, batch())
        chances = handle.ist.policy.draw(1)[1]
        assert len(set(chances)) == LAYERS
        for name, grad in gradients.items():
            chance = chances[int(name.split(".")[2])] if ".layers." in name else 1.0
            torch.testing.assert_close(grad, full[name] / chance, rtol=1e-12, atol=1e-15)


def refused(model, said, **options):
    with pytest.raises(ValueError, match=said):
        attach(model, ist=options or True)


def test_models_that_it_does_not_fit_are_refused():
    refused(get_peft_model(deep_llama(), lora()), "Use policy='random'", policy="lisa")
    refused(deep_llama().requires_grad_(False), "nothing to choose from")
    shared = deep_llama()
    shared.model.layers[3].mlp = shared.model.layers[1].mlp
    refused(shared, "Layers 1 and 3 of LlamaForCausalLM share weights")
    merged = get_peft_model(deep_llama(), lora())
    merged.merge_adapter()
    refused(merged, r"Call unmerge_adapter\(\) first", policy="top")
    model = deep_llama()
    with attach(model, ist=True) as handle:
        refused(model, "attached to this model already")
        few = torch.optim.AdamW(layers_of(model)[:3].parameters())
        with pytest.raises(ValueError, match="all parameters of layer 3, which would never train"):
            handle.ist.manage(few)


def test_layers_without_trained_weights_are_never_drawn():
    model = get_peft_model(deep_llama(), lora(layers_to_transform=[1, 3, 4]))
    with attach(model, ist={"policy": "round_robin", "layers": 0.34, "period": 1}) as handle:
        seen = []
        for index in range(3):
            handle.ist.begin_step(index)
            seen += handle.ist.active
            _, gradients, _ = step(model, batch())
            assert gradients and all(f".layers.{handle.ist.active[0]}." in name for name in gradients)
        assert seen == [1, 3, 4]


def test_the_report_has_a_map_of_who_trained_when():
    model = deep_llama(layers=3)
    with attach(model, ist={"policy": "round_robin", "layers": 0.34, "period": 2}) as handle:
        for index in range(6):
            handle.ist.begin_step(index)
        lines = handle.report().splitlines()
    assert (
        "Sparse tuning of LlamaForCausalLM: 1 of 3 layers train for 2 steps, policy=round_robin, state=free" in lines
    )
    assert [line.partition("| ")[2] for line in lines[-3:]] == ["  #", " # ", "#  "]
