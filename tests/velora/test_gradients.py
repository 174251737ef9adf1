"""Losses and gradients of whole models: the identities of the method, and what it composes with."""

import pytest
import torch

from hf_tokenseek import attach
from tests.seek.tiny_families import tiny_model
from tests.velora.tiny_velora import ALL, batch, gradients, model, recorded_inputs
from tokenseek_kernels import compress, expand

FAMILIES = ("llama", "gemma2", "olmo2", "phi3", "gpt_neox", "opt", "starcoder2", "phi")
EXACT = [{"projector": "average"}, {"projector": "random"}, {"projector": "mixed"}]


def compressed_names(handle):
    return {f"{c.unit.path}.{path}": c.projector for c in handle.velora.inputs.values() for path in c.unit.readers}


@pytest.mark.parametrize("options", EXACT, ids=lambda o: o["projector"])
@pytest.mark.parametrize("family", FAMILIES)
def test_as_many_groups_as_features_equal_plain_training(family, options):
    tiny, inputs = model(family), batch()
    loss, plain = tiny(**inputs).loss, gradients(tiny, inputs)
    with attach(tiny, velora={"groups": 128, **options}):
        assert tiny(**inputs).loss == loss
        found = gradients(tiny, inputs)
    assert set(found) == set(plain)
    for name, gradient in plain.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-14, msg=name)


@pytest.mark.parametrize("options", [{}, {"projector": "random", "rank": 2}, {"projector": "mixed", "rank": 3}])
@pytest.mark.parametrize("family", FAMILIES)
def test_only_compressed_weights_change_and_by_the_naive_formula(family, options):
    tiny, inputs = model(family), batch()
    plain = gradients(tiny, inputs)
    loss = tiny(**inputs).loss
    with attach(tiny, velora={"groups": 7, **options}) as handle:
        assert tiny(**inputs).loss == loss
        found = gradients(tiny, inputs)
        projectors = compressed_names(handle)
        read = recorded_inputs(tiny, projectors, lambda: tiny.eval()(**inputs))
        tiny.train()
        upstream = {}
        hooks = [
            tiny.get_submodule(name).register_full_backward_hook(
                lambda module, _, grads, name=name: upstream.__setitem__(name, grads[0])
            )
            for name in projectors
        ]
        tiny(**inputs).loss.backward()
        for hook in hooks:
            hook.remove()
        tiny.zero_grad(set_to_none=True)
    for name, gradient in plain.items():
        owner = name.removesuffix(".weight")
        if owner in projectors:
            projector, x = projectors[owner], read[owner]
            z = compress(x, projector.directions, projector.size, impl="reference")
            rebuilt = expand(z, projector.expansion, projector.size).flatten(0, -2)
            gradient = upstream[owner].flatten(0, -2).T @ rebuilt
            assert not torch.allclose(gradient, plain[name])
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-9, msg=name)


def test_directions_are_the_mean_of_real_tokens_without_dropout():
    tiny, inputs = model(), batch()
    tiny.config.attention_dropout = 0.5
    for layer in tiny.model.layers:
        layer.self_attn.attention_dropout = 0.5
    with attach(tiny, velora={"groups": 8}) as handle:
        tiny(**inputs)
        projectors = compressed_names(handle)
        read = recorded_inputs(tiny, projectors, lambda: tiny.eval()(**inputs))
    for name, projector in projectors.items():
        tokens = read[name][inputs["attention_mask"].bool()]
        mean = tokens.unflatten(-1, (8, -1)).mean((0, 1))
        v = projector.directions[0].unflatten(0, (8, -1))
        torch.testing.assert_close(v, (mean / mean.norm()).expand_as(v))


def test_directions_stay_unless_they_are_refreshed():
    tiny = model()

    def drawn(handle):
        return [c.projector.directions.clone() for c in handle.velora.inputs.values()]

    for every, changes in ((0, []), (2, [2, 4]), (1, [1, 2, 3, 4])):
        with attach(tiny, velora={"groups": 8, "refresh_steps": every}) as handle:
            last, seen = None, []
            for step in range(5):
                handle.velora.begin_step(step)
                for micro in range(2):
                    tiny(**batch(seed=10 * step + micro)).loss.backward()
                    now = drawn(handle)
                    if last is not None and not all(map(torch.equal, now, last)):
                        assert micro == 0
                        seen.append(step)
                    last = now
            assert seen == changes


def test_evaluation_is_plain_and_draws_nothing():
    tiny, inputs = model(), batch()
    plain = tiny.eval()(**inputs).logits
    with attach(tiny, velora={"groups": 4}) as handle:
        assert torch.equal(tiny(**inputs).logits, plain)
        with torch.no_grad():
            tiny.train()(**inputs)
        assert all(c.projector.directions is None for c in handle.velora.inputs.values())


def test_a_part_of_the_model_alone_has_no_directions():
    tiny, inputs = model(), batch()
    with attach(tiny, velora=True), pytest.raises(ValueError, match="no directions for model.layers.0.attention yet"):
        tiny.model(input_ids=inputs["input_ids"])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(reentrant):
    tiny, inputs = model(), batch()
    with attach(tiny, velora={"groups": 8}):
        plain = gradients(tiny, inputs)
        tiny.gradient_checkpointing_enable({"use_reentrant": reentrant})
        tiny.enable_input_require_grads()
        found = gradients(tiny, inputs)
    for name, gradient in plain.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("order", ["whole", "two halves"])
def test_accumulation_adds_up_with_fixed_directions(order):
    tiny = model()
    whole = batch(rows=4, padding=0)
    with attach(tiny, velora={"groups": 8}):
        once = gradients(tiny, whole)  # draws the directions
        if order == "whole":
            permuted = {name: tensor[[2, 0, 3, 1]] for name, tensor in whole.items()}
            found = gradients(tiny, permuted)
        else:
            halves = [{name: tensor[part] for name, tensor in whole.items()} for part in (slice(2), slice(2, 4))]
            both = [gradients(tiny, half) for half in halves]
            found = {name: (both[0][name] + both[1][name]) / 2 for name in once}
    for name, gradient in once.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"lean": True},
        {"seek": {"ratio": 1.0, "plain_fallback": False}},
        {"lean": True, "seek": {"ratio": 1.0, "plain_fallback": False}},
    ],
)
def test_composes_with_exact_settings_of_the_others(options):
    tiny, inputs = model(), batch()
    with attach(tiny, velora={"groups": 8}):
        alone = gradients(tiny, inputs)
    with attach(tiny, velora={"groups": 8}, **options):
        together = gradients(tiny, inputs)
    for name, gradient in alone.items():
        torch.testing.assert_close(together[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_with_seek_and_all_groups_gradients_are_those_of_seek():
    tiny, inputs = model(), batch()
    seek = {"context": 0.2, "plain_fallback": False, "labelled": 0.5}
    with attach(tiny, seek=seek):
        alone = gradients(tiny, inputs)
    with attach(tiny, seek=seek, velora={"groups": 128}):
        together = gradients(tiny, inputs)
    for name, gradient in alone.items():
        torch.testing.assert_close(together[name], gradient, rtol=1e-9, atol=1e-12)


def test_unbiased_directions_give_the_exact_gradient_on_average():
    tiny, inputs = tiny_model("llama"), batch()
    name = "model.layers.1.mlp.down_proj.weight"
    exact = gradients(tiny, inputs)[name]
    for options in ({"projector": "random", "rank": 4}, {"projector": "mixed", "rank": 4}):
        with attach(tiny, velora={"groups": 16, "inputs": ["down"], **options}) as handle:
            total, count = torch.zeros_like(exact), 300
            errors = []
            for step in range(count):
                handle.velora.begin_step(step)
                found = gradients(tiny, inputs)[name]
                total += found
                errors.append(float((found - exact).square().sum()))
        # the mean of `count` independent draws is `sqrt(count)` times nearer than one of them
        bound = 3 * (sum(errors) / count / count) ** 0.5
        assert float((total / count - exact).norm()) < bound < 0.5 * float(exact.norm())


def test_probe_measures_energy_and_cosine():
    tiny, inputs = model(), batch()
    exact = gradients(tiny, inputs)
    with attach(tiny, velora={"groups": 8, "probe_steps": 2}) as handle:
        found = gradients(tiny, inputs)
        figures = handle.velora.telemetry.read()
        gradients(tiny, inputs)  # the same step: probed once
        assert set(handle.velora.telemetry.read()) == {"velora/saved_mib"}
        names = [f"{name}.weight" for name in compressed_names(handle)]
        reads = recorded_inputs(tiny, compressed_names(handle), lambda: tiny.eval()(**inputs))
    own, full = (torch.cat([side[name].flatten() for name in names]) for side in (found, exact))
    assert figures["velora/gradient_cosine"] == pytest.approx(float(own @ full / own.norm() / full.norm()), rel=1e-5)
    firsts = [c.unit.path + "." + next(iter(c.unit.readers)) for c in handle.velora.inputs.values()]
    kept = whole = 0.0
    for first, compressed in zip(firsts, handle.velora.inputs.values(), strict=True):
        x, p = reads[first], compressed.projector
        kept += float(compress(x, p.directions, p.size, impl="reference").square().sum())
        whole += float(x.square().sum())
    assert figures["velora/retained_energy"] == pytest.approx(kept / whole, rel=1e-5)


def test_all_inputs_are_named_in_the_table():
    with attach(model(), velora={"groups": 16}) as handle:
        table = handle.report()
    for words in ("q_proj, k_proj, v_proj", "gate_proj, up_proj", "down_proj", *ALL):
        assert words in table
    # width 64 and 128 in float64, 16 numbers kept
    assert f"{2 * 64 * 8 * 1000 / 2**20:9.3f} -> {2 * 16 * 8 * 1000 / 2**20:8.3f} MiB" in table
