"""Losses with layers turned down, against a model whose scalings are edited by hand; and that nothing stays edited."""

import pytest
import torch
from peft import IA3Config, LoHaConfig, get_peft_model

from hf_tokenseek import attach
from hf_tokenseek.ist.suppression import Prober, turned_down
from tests.ist.tiny_ist import LAYERS, batch, deep_llama, layers_of, step
from tests.peft.tiny_peft import CAUSAL, LORA_VARIANTS, lora

BETA = 0.25
SCALED = ("lora", "rslora", "lora-everywhere", "lora-biases")
OTHERS = {
    "dora": lambda: lora(use_dora=True),
    "loha": lambda: LoHaConfig(**CAUSAL, target_modules=["q_proj", "down_proj"], r=4, init_weights=False),
    "ia3": lambda: IA3Config(
        **CAUSAL,
        target_modules=["q_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        init_ia3_weights=False,
    ),
}


def loss_of(model, suppressed=(), beta=BETA, lean=False):
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return Prober(base).loss(batch(), [layers_of(model)[i] for i in suppressed], beta)


def plain_loss(model):
    model.eval()
    with torch.no_grad():
        loss = float(model(**batch()).loss)
    model.train()
    return loss


def lora_modules(model, layers):
    return [m for i in layers for m in layers_of(model)[i].modules() if hasattr(m, "lora_A")]


@pytest.mark.parametrize("variant", SCALED)
@pytest.mark.parametrize("lean", [False, True])
def test_lora_is_as_if_its_scaling_were_smaller(variant, lean):
    config = LORA_VARIANTS[variant]()
    config.lora_dropout = 0.3  # off, as in evaluation
    model = get_peft_model(deep_llama(), config)
    before = [dict(m.scaling) for m in lora_modules(model, range(LAYERS))]
    if lean:
        with attach(model, lean=True):
            found = loss_of(model, [1, 4])
    else:
        found = loss_of(model, [1, 4])
    assert [dict(m.scaling) for m in lora_modules(model, range(LAYERS))] == before
    unsuppressed = plain_loss(model)
    for module in lora_modules(model, [1, 4]):
        module.scaling = {name: value * BETA for name, value in module.scaling.items()}
    assert found == pytest.approx(plain_loss(model), rel=1e-6) != unsuppressed


@pytest.mark.parametrize("name", OTHERS)
def test_other_adapters_keep_a_share_of_what_they_add(name):
    model = get_peft_model(deep_llama(), OTHERS[name]())
    found = loss_of(model, [1, 4])

    def weaken(module, args, output):
        return module.base_layer(*args) + BETA * (output - module.base_layer(*args))

    tuned = [m for i in (1, 4) for m in layers_of(model)[i].modules() if hasattr(m, "active_adapters")]
    hooks = [m.register_forward_hook(weaken) for m in tuned if hasattr(m, "base_layer")]
    expected = plain_loss(model)
    for hook in hooks:
        hook.remove()
    assert hooks and found == pytest.approx(expected, rel=1e-6) != plain_loss(model)


def test_layers_without_adapters_keep_a_share_of_what_they_add():
    model = deep_llama()
    found = loss_of(model, [1, 4])
    hooks = [
        layers_of(model)[i].register_forward_hook(lambda module, args, output: args[0] + BETA * (output - args[0]))
        for i in (1, 4)
    ]
    assert found == pytest.approx(plain_loss(model), rel=1e-6)
    for hook in hooks:
        hook.remove()
    assert found != plain_loss(model)


def test_without_suppression_it_is_the_models_own_loss():
    model = get_peft_model(deep_llama(), lora())
    assert loss_of(model) == loss_of(model, range(LAYERS), beta=1.0) == pytest.approx(plain_loss(model), rel=1e-6)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_everything_is_as_before_also_after_an_error(kind):
    model = get_peft_model(deep_llama(), lora()) if kind == "lora" else deep_llama()
    before = [vars(module).keys() - {"_forward_hooks"} for module in model.modules()]
    expected = step(model, batch())
    hook = layers_of(model)[3].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), turned_down(layers_of(model), BETA):
        model(**batch())
    hook.remove()
    assert [vars(module).keys() - {"_forward_hooks"} for module in model.modules()] == before
    assert all(module.training for module in model.modules())
    found = step(model, batch())
    assert torch.equal(found[0], expected[0]) and all(torch.equal(g, expected[1][n]) for n, g in found[1].items())


def test_new_adapters_teach_exactly_nothing():
    model = get_peft_model(deep_llama(torch.float32), lora(init_lora_weights=True, use_dora=False))
    with attach(model, ist={"score_steps": 1}) as handle:
        for index in (1, 2):
            handle.ist.begin_step(index)
            model(**batch())
        assert handle.ist.policy.importance.values == [0.0] * LAYERS


@pytest.mark.parametrize("seek", [None, {"context": 0.2, "plain_fallback": False}])
def test_learns_from_the_first_micro_batch_of_a_step_that_is_due_before_it_is_trained_on(seek):
    model = get_peft_model(deep_llama(), lora(lora_dropout=0.1))
    with attach(model, seek=seek, ist={"score_steps": 3, "candidates": 4}) as handle:
        values, prober = handle.ist.policy.importance.values, Prober(model.get_base_model())
        for index in range(7):
            handle.ist.begin_step(index)
            before, due = list(values), index in (3, 6)
            if due:
                sets = handle.ist.policy.sets(index)
                losses = [prober.loss(batch(seed=index), [layers_of(model)[i] for i in own], BETA) for own in sets]
                expected = type(handle.ist.policy.importance)(handle.ist.config, LAYERS)
                expected.load_state_dict(handle.ist.policy.importance.state_dict())
                expected.update(sets, losses)
            model(**batch(seed=index)).loss.backward()
            values = handle.ist.policy.importance.values
            assert (values != before) == due
            if due:
                assert values == expected.values
                # not again for the second micro-batch
                model(**batch(seed=99)).loss.backward()
                assert handle.ist.policy.importance.values == values
        assert 0 < handle.ist.metrics()["ist/probe_share"] < 1


def test_evaluation_teaches_nothing_and_labels_are_asked_for():
    model = get_peft_model(deep_llama(), lora())
    with attach(model, ist={"score_steps": 1}) as handle:
        handle.ist.begin_step(1)
        model.eval()
        model(**batch())
        model.train()
        with torch.no_grad():
            model(**batch())
        assert handle.ist.policy.importance.values == [0.0] * LAYERS
        with pytest.raises(ValueError, match="needs `labels`.*'random'"):
            model(input_ids=batch()["input_ids"])


def test_padding_and_unlabelled_tokens_do_not_count():
    model, inputs = deep_llama(), batch()
    more = {
        name: torch.nn.functional.pad(t, (0, 4), value=-100 if name == "labels" else 0) for name, t in inputs.items()
    }
    assert Prober(model).loss(more) == pytest.approx(Prober(model).loss(inputs), rel=1e-6)
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    assert Prober(model).loss(inputs) == 0.0
