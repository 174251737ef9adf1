"""Which layers read the same tensor: what the paths say against what the layers are given."""

import peft
import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, get_peft_model
from torch import nn

from hf_tokenseek import attach
from hf_tokenseek.families import SUPPORTED
from hf_tokenseek.patching import find_layers
from hf_tokenseek.velora.inputs import find_inputs
from tests.velora.tiny_velora import ALL, model


def tensors_read(model):
    """By tensor, the paths of the modules with a matrix of their own that read it, in the last decoder layer."""
    path, layers = find_layers(model)
    kept, readers = [], {}

    def record(name):
        def hook(module, args, kwargs):
            found = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.is_floating_point()]
            kept.append(found[0])
            readers.setdefault(found[0].data_ptr(), set()).add(name)  # experts read it as rows

        return hook

    hooks = [
        module.register_forward_pre_hook(record(name), with_kwargs=True)
        for name, module in layers[-1].named_modules()
        if any(p is not None and p.dim() > 1 for p in module._parameters.values())
    ]
    with torch.no_grad():
        model.eval()(input_ids=torch.tensor([[3, 4, 5]]))
    for hook in hooks:
        hook.remove()
    return list(readers.values())


@pytest.mark.parametrize("family", [f for f in SUPPORTED if f not in ("gpt2", "jetmoe")])
def test_readers_and_keepers_are_who_reads_the_tensor(family):
    tiny = model(family, torch.float32)
    path, layers = find_layers(tiny)
    found = [unit for unit in find_inputs(tiny, ALL) if unit.path == f"{path}.{len(layers) - 1}"]
    assert found
    read = tensors_read(tiny)
    for unit in found:
        claimed = {*unit.readers, *(keeper.partition(" ")[0] for keeper in unit.keepers)}
        (truth,) = [paths for paths in read if set(unit.readers) & paths]
        assert claimed == truth, unit.name
        assert all(type(m) is nn.Linear and m.in_features == unit.width for m in unit.compressible)


def test_every_layer_is_found_once():
    tiny = model()
    units = list(find_inputs(tiny, ALL))
    assert [unit.key for unit in units] == [f"model.layers.{i}.{name}" for i in range(2) for name in ALL]
    assert [len(unit.compressible) for unit in units] == [3, 2, 1] * 2


def test_frozen_layers_keep_nothing_and_are_left_alone():
    tiny = model()
    tiny.model.layers[0].requires_grad_(False)
    tiny.model.layers[1].self_attn.k_proj.requires_grad_(False)
    units = {unit.key: unit for unit in find_inputs(tiny, ALL)}
    assert list(units) == [f"model.layers.1.{name}" for name in ALL]
    assert len(units["model.layers.1.attention"].compressible) == 2 and not units["model.layers.1.attention"].keepers


def test_half_of_a_shared_block_input_saves_nothing():
    with pytest.raises(ValueError, match=r"would save nothing of 'attention\+mlp' in 2 layers.*mlp.gate_proj"):
        attach(model("cohere"), velora={"inputs": ["attention", "down"]})
    with attach(model("cohere"), velora={"inputs": ["attention", "mlp"]}) as handle:
        assert {c.unit.name for c in handle.velora.inputs.values()} == {"attention+mlp"}


def test_experts_keep_the_tensor():
    with pytest.raises(ValueError, match=r"would save nothing of 'mlp'.*mlp.experts \(DeepseekV2Experts\)"):
        attach(model("deepseek_v2"), velora=True)
    with attach(model("deepseek_v2"), velora={"inputs": ["attention", "down"]}) as handle:
        assert "nothing saved" not in handle.report()
    with attach(model("deepseek_v2"), velora={"force": True}) as handle:
        assert "nothing saved: other layers keep it" in handle.report()


@pytest.mark.parametrize("family", ["gpt2", "jetmoe"])
def test_layers_of_other_kinds_are_refused(family):
    with pytest.raises(ValueError, match="finds no trained linear layer that reads"):
        attach(model(family), velora=True)


def test_lora_on_some_layers_compresses_those():
    peft = get_peft_model(model(), LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"]))
    units = list(find_inputs(peft.get_base_model(), ("attention", "down")))
    assert [len(unit.compressible) for unit in units] == [2, 1] * 2
    assert all(unit.compressible[0].weight.shape[0] == 8 for unit in units)
    with pytest.raises(ValueError, match=r"no trained linear layer that reads \['mlp'\]"):
        attach(peft, velora=True)


@pytest.mark.parametrize(
    "config",
    [
        LoHaConfig(target_modules=["q_proj"]),
        IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        LoraConfig(target_modules=["q_proj"], velora_config=peft.VeloraConfig(num_groups=4)),
    ],
    ids=["LoHa", "IA3", "PEFT's VeLoRA"],
)
def test_other_adapters_are_refused(config):
    with pytest.raises(ValueError, match="finds no trained linear layer"):
        attach(get_peft_model(model(), config), velora={"inputs": ["attention"]})


def test_a_model_is_attached_once_and_given_back():
    tiny = model()
    kinds = {name: type(module) for name, module in tiny.named_modules()}
    state = set(tiny.state_dict())
    handle = attach(tiny, velora={"compressed_state": True})
    with pytest.raises(ValueError, match="attached to this model already"):
        attach(tiny, velora=True)
    assert set(tiny.state_dict()) == state
    tiny.load_state_dict(tiny.state_dict())
    handle.undo()
    assert {name: type(module) for name, module in tiny.named_modules()} == kinds
    assert all(p.requires_grad for p in tiny.parameters()) and not hasattr(
        tiny.model.layers[0].mlp.down_proj, "velora_input"
    )
