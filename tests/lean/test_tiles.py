"""MLPs in tiles: the same loss and gradients, one tile's activations at a time."""

import pytest
import torch
from torch import nn

from hf_tokenseek import LeanCallback, SeekConfig, TokenSeekArguments, attach
from hf_tokenseek.lean.tiles import CHECKPOINT, tiled
from hf_tokenseek.memory import LiveMemory, SavedActivations
from tests.lean.test_lean_layers import FAMILIES, assert_same, batch_for, lora, saved_bytes, step
from tests.seek.tiny_families import tiny_model


@pytest.mark.parametrize("tiles", [2, 5, 40])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_plain_model(family, tiles):
    """22 rows: tiles of 11, uneven ones, and more tiles than rows, of which 18 are empty."""
    model = tiny_model(family)
    batch = batch_for(model)
    truth = step(model, batch)
    with attach(model, lean=True):
        before = saved_bytes(model, batch)
    with attach(model, lean=True, mlp_tiles=tiles) as handle:
        assert f"H, in {tiles} tiles" in handle.report()
        assert_same(step(model, batch), truth, 2e-5)
        assert saved_bytes(model, batch) < before
    assert_same(step(model, batch), truth, 1e-9)


class Wide(nn.Module):
    """An MLP whose hidden state is 64 times as wide as its input."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        vars(self).update(CHECKPOINT)
        self.up, self.down = nn.Linear(4, 256, dtype=dtype), nn.Linear(256, 4, dtype=dtype)

    def forward(self, hidden_states):
        return self.down(torch.tanh(self.up(hidden_states)))


@pytest.mark.parametrize("shape", [(7, 4), (2, 3, 4), (1, 1, 4)])
def test_gradients_are_those_of_finite_differences(shape):
    torch.manual_seed(0)
    mlp, x = Wide(), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    forward = tiled(Wide.forward, 3)
    assert torch.autograd.gradcheck(lambda x, *_: forward(mlp, x), (x, *mlp.parameters()))
    upstream = torch.randn(shape, dtype=torch.float64)
    inputs = (x, *mlp.parameters())
    for found, truth in zip(
        torch.autograd.grad(forward(mlp, x), inputs, upstream),
        torch.autograd.grad(mlp(x), inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tiles", [4, 8])
def test_one_tile_lives_at_a_time_and_only_the_input_is_kept(tiles):
    rows = 512
    mlp = Wide(torch.float32)
    x = torch.randn(rows, 4, requires_grad=True)
    forward, peaks = tiled(Wide.forward, tiles), {}
    with SavedActivations(mlp) as saved:
        y = forward(mlp, x)
    # the input is a leaf of ours, and nothing else is kept
    assert saved.bytes <= x.nbytes
    for name, run in {"plain": mlp, "tiled": lambda x: forward(mlp, x)}.items():
        with LiveMemory() as live:
            run(x).sum().backward()
        peaks[name] = live.peak_bytes
        with torch.no_grad(), LiveMemory() as live:
            run(x)
        peaks[f"{name}, no gradients"] = live.peak_bytes
    hidden = rows * 256 * 4
    # at the most: the hidden state, its tanh, their gradient; outside of a tile inputs and outputs, of 1/64
    assert peaks["tiled"] <= 4 * hidden / tiles + 16 * x.nbytes + 2 * sum(p.nbytes for p in mlp.parameters())
    assert peaks["tiled"] < peaks["plain"] / 2
    assert peaks["tiled, no gradients"] <= 2 * hidden / tiles + 4 * x.nbytes < peaks["plain, no gradients"]
    assert y.shape == x.shape


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_gradient_checkpointing(tiny_llama, reentrant):
    model = tiny_llama()
    batch = batch_for(model)
    truth = step(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with attach(model, lean=True, mlp_tiles=3):
        assert_same(step(model, batch), truth, 1e-5)


SEEK = SeekConfig(ratio=0.25, score="recent", plain_fallback=False)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "methods",
    [
        {"seek": SEEK},
        {"lemo": {"keep": 0.5, "block": 8, "dense_first": 1}},
        {"lemo": {"keep": 0.5, "block": 8, "dense_first": 1, "mode": "detach"}},
        {"seek": SEEK, "lemo": {"keep": 0.5, "block": 8, "dense_first": 1}},
        {"ist": {"layers": 0.5, "policy": "round_robin"}},
    ],
    ids=str,
)
def test_with_the_methods(tiny_llama, methods, checkpointing):
    model = tiny_llama()
    batch = batch_for(model, 1, 64)
    if checkpointing:
        model.gradient_checkpointing_enable()

    def run(**options):
        torch.manual_seed(3)
        with attach(model, **methods, **options) as handle:
            handle.begin_step(0)
            return step(model, batch)

    assert_same(run(lean=True, mlp_tiles=3), run(lean=True), 1e-5)


def test_with_lora_and_its_dropout():
    model = lora(tiny_model("llama"))
    batch = batch_for(model)
    truth = step(model, batch)
    with attach(model, lean=True, mlp_tiles=3):
        assert_same(step(model, batch), truth, 1e-5)
    model = lora(tiny_model("llama"), lora_dropout=0.5)
    with attach(model, lean=True, mlp_tiles=3):
        # what is computed again has the same masks: two steps of one seed agree
        assert_same(step(model, batch), step(model, batch), 1e-9)


def test_the_argument_is_checked_and_reaches_the_model(tiny_llama, tmp_path):
    for wrong in (0, -1, 2.0, True, "4"):
        with pytest.raises(ValueError, match="`mlp_tiles` should be a whole number of at least 1"):
            LeanCallback(mlp_tiles=wrong)
    with pytest.raises(ValueError, match="mlp_tiles=4 .*lean=True"):
        TokenSeekArguments(output_dir=str(tmp_path), mlp_tiles=4)
    with pytest.raises(ValueError, match="mlp_tiles=4 .*lean=True"):
        attach(tiny_llama(), seek=True, mlp_tiles=4)
    with pytest.raises(ValueError, match="VeLoRA knows no tiles"):
        TokenSeekArguments(output_dir=str(tmp_path), lean=True, velora="true", mlp_tiles=4)
    with pytest.raises(ValueError, match="VeLoRA knows no tiles"):
        attach(tiny_llama(), lean=True, velora=True, mlp_tiles=4)
    with pytest.raises(ValueError, match="mlp='neurons' .*mlp_tiles=4"):
        TokenSeekArguments(output_dir=str(tmp_path), lean=True, lemo={"mlp": "neurons"}, mlp_tiles=4)
    with pytest.raises(ValueError, match="mlp='neurons' .*mlp_tiles=4"):
        attach(tiny_llama(), lean=True, lemo={"mlp": "neurons"}, mlp_tiles=4)
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp = nn.Identity()
    with pytest.raises(ValueError, match="mlp_tiles=4 finds no MLP"):
        attach(model, lean=True, mlp_tiles=4)
