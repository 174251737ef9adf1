"""Trajectories: what a fixed projection means for SGD and AdamW, and AdamW on compressed gradients."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_tokenseek import attach
from hf_tokenseek.velora import VeloraAdamW
from tests.velora.tiny_velora import batch, model

NAME = "model.layers.1.mlp.down_proj"
GROUPS = 5  # 128 features: sub-tokens of 26, the last of 24


def trained(start, make, steps, options=None, rates=None, only=""):
    """A copy of `start` after `steps` steps of `make(parameters)` with VeLoRA, of those named `only`."""
    tiny = copy.deepcopy(start)
    for name, parameter in tiny.named_parameters():
        parameter.requires_grad_(only in name)
    with attach(tiny, velora={"groups": GROUPS, "inputs": ["mlp", "down"], **(options or {})}) as handle:
        optimizer = make([p for p in tiny.parameters() if p.requires_grad])
        for step in range(steps):
            handle.velora.begin_step(step)
            for group in optimizer.param_groups:
                group["lr"] *= 1.0 if rates is None else rates[step]
            tiny(**batch(seed=step)).loss.backward()
            norm = nn.utils.clip_grad_norm_([p for p in tiny.parameters() if p.requires_grad], 1.0)
            optimizer.step()
            optimizer.zero_grad()
        tiny.last_norm = norm
        tiny.velora_state = handle.velora.state_dict()
    return tiny


def assert_same(first, second, tolerance=1e-6):
    """The same parameters, relative to how far they are from zero."""
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert float((a - b).abs().max()) <= tolerance * float(b.abs().max()), name


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("eps", [1e-8, 1e-3])
def test_adamw_on_compressed_gradients_is_dense_adamw(eps, decay):
    start, rates = model(), [1.0 - 0.01 * (step % 3) for step in range(50)]
    dense = trained(start, lambda p: torch.optim.AdamW(p, lr=3e-3, eps=eps, weight_decay=decay), 50, rates=rates)
    options = {"compressed_state": True}
    compressed = trained(start, lambda p: VeloraAdamW(p, lr=3e-3, eps=eps, weight_decay=decay), 50, options, rates)
    assert_same(compressed, dense)
    # and the norm that clipping sees
    torch.testing.assert_close(compressed.last_norm, dense.last_norm, rtol=1e-6, atol=0)
    moved = compressed.get_parameter(f"{NAME}.weight") - start.get_parameter(f"{NAME}.weight")
    assert float(moved.abs().max()) > 1e-2


def test_gradients_and_moments_have_the_compressed_size():
    tiny = model()
    dense_bytes = sum(
        12 / 8 * p.numel() * p.element_size() * 8 / 4
        for name, p in tiny.named_parameters()
        if any(part in name for part in ("gate_proj", "up_proj", "down_proj"))
    )
    with attach(tiny, velora={"groups": 4, "inputs": ["mlp", "down"], "compressed_state": True}) as handle:
        optimizer = VeloraAdamW([p for p in tiny.parameters() if p.requires_grad], lr=1e-3)
        tiny(**batch()).loss.backward()
        optimizer.step()
        modules = [m for c in handle.velora.inputs.values() for m in c.unit.compressible]
        assert all(m.weight.grad is None for m in modules)
        state = [optimizer.state[m.velora_gradient] for m in modules]
        held = sum(
            t.numel() * t.element_size()
            for m, s in zip(modules, state, strict=True)
            for t in (m.velora_gradient.grad, s["exp_avg"], s["exp_avg_sq"])
        )
    # gate and up: 64 / 4 times smaller, down: 128 / 4
    expected = 2 * 3 * 8 * (2 * 128 * 4 + 64 * 4)
    assert held == expected and dense_bytes == 2 * 3 * 8 * (2 * 128 * 64 + 64 * 128)


def test_sgd_is_lora_with_a_frozen_a():
    start = model()
    ours = trained(start, lambda p: torch.optim.SGD(p, lr=0.05), 50, {"inputs": ["down"]})
    directions = ours.velora_state["directions"]
    reference = copy.deepcopy(start)

    class FrozenA(nn.Module):
        def __init__(self, plain, direction):
            super().__init__()
            size = -(-128 // GROUPS)
            a = torch.zeros(GROUPS, 128, dtype=torch.float64)
            for group in range(GROUPS):
                part = slice(group * size, (group + 1) * size)
                a[group, part] = direction[0, part].double()
            self.register_buffer("a", a)
            self.register_buffer("weight", plain.weight.detach().clone())
            self.b = nn.Parameter(torch.zeros(64, GROUPS, dtype=torch.float64))

        def forward(self, x):
            return F.linear(x, self.weight) + F.linear(F.linear(x, self.a), self.b)

    for index, layer in enumerate(reference.model.layers):
        layer.mlp.down_proj = FrozenA(layer.mlp.down_proj, directions[f"model.layers.{index}.down"])
    optimizer = torch.optim.SGD([p for p in reference.parameters() if p.requires_grad], lr=0.05)
    for step in range(50):
        reference(**batch(seed=step)).loss.backward()
        nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    merged = reference.model.layers[1].mlp.down_proj
    merged = merged.weight + merged.b @ merged.a
    torch.testing.assert_close(merged, ours.get_parameter(f"{NAME}.weight").detach(), rtol=1e-6, atol=1e-7)


def test_updates_have_the_rank_of_the_groups():
    start = model()
    for make in (
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.AdamW(p, 1e-2, eps=0.0, weight_decay=0.0),
    ):
        moved = trained(start, make, 8, {"inputs": ["down"]}, only="down_proj").get_parameter(
            f"{NAME}.weight"
        ) - start.get_parameter(f"{NAME}.weight")
        values = torch.linalg.svdvals(moved.detach())
        assert values[GROUPS] < 1e-6 * values[0] < values[GROUPS - 1]


def test_without_eps_adam_sees_the_signs_of_the_directions_only():
    start, options = model(), {"compressed_state": True, "inputs": ["down"]}
    after = trained(start, lambda p: VeloraAdamW(p, lr=1e-2, eps=0.0, weight_decay=0.0), 1, options, only="down_proj")
    moved = (after.get_parameter(f"{NAME}.weight") - start.get_parameter(f"{NAME}.weight")).detach()
    signs = after.velora_state["directions"]["model.layers.1.down"][0].sign().double()
    steps = moved * signs
    size = -(-128 // GROUPS)
    for group in range(GROUPS):
        part = steps[:, group * size : (group + 1) * size]
        torch.testing.assert_close(part, part[:, :1].expand_as(part), rtol=1e-9, atol=0)


@pytest.mark.parametrize("moments", ["transport", "reset"])
def test_moments_follow_new_directions(moments):
    tiny = model()
    options = {"groups": 4, "inputs": ["down"], "compressed_state": True, "refresh_steps": 2}
    with attach(tiny, velora=options) as handle:
        optimizer = VeloraAdamW([p for p in tiny.parameters() if p.requires_grad], lr=1e-2, moments=moments)
        module, beta1, beta2 = tiny.get_submodule(NAME), 0.9, 0.999
        projector = module.velora_input.projector
        for step in range(3):
            handle.velora.begin_step(step)
            old = None if projector.directions is None else projector.directions.clone()
            state = optimizer.state[module.velora_gradient]
            before = [state[name].clone() for name in ("exp_avg", "exp_avg_sq")] if state else None
            tiny(**batch(seed=step)).loss.backward()
            grad = module.velora_gradient.grad.clone()
            optimizer.step()
            optimizer.zero_grad()
        cosines = (old * projector.directions)[0].unflatten(0, (4, -1)).sum(-1).double()
        assert (cosines < 0.9999).all()
        if moments == "reset":
            cosines = torch.zeros_like(cosines)
        first = beta1 * before[0] * cosines + (1 - beta1) * grad
        second = beta2 * before[1] * cosines**2 + (1 - beta2) * grad**2
        torch.testing.assert_close(state["exp_avg"], first, rtol=1e-9, atol=1e-15)
        torch.testing.assert_close(state["exp_avg_sq"], second, rtol=1e-9, atol=1e-18)
        assert float(state["step"]) == (1 if moments == "reset" else 3)


@pytest.mark.parametrize("option", ["amsgrad", "maximize"])
def test_unknown_variants_are_refused(option):
    with pytest.raises(ValueError, match=f"does not support {option}=True"):
        VeloraAdamW([nn.Parameter(torch.zeros(1))], lr=0.1, **{option: True})


def test_parameters_that_are_not_compressed_are_torchs():
    plain, ours = (nn.Linear(4, 3) for _ in range(2))
    ours.load_state_dict(plain.state_dict())
    for linear, kind in ((plain, torch.optim.AdamW), (ours, VeloraAdamW)):
        optimizer = kind(linear.parameters(), lr=0.1, weight_decay=0.1)
        for step in range(3):
            linear(torch.full((2, 4), float(step))).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(plain.weight, ours.weight) and torch.equal(plain.bias, ours.bias)
