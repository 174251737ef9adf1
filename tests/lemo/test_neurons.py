"""The MLP that remembers its largest columns, against the plain one whose other columns are masked in backward."""

import pytest
import torch
from torch import nn

from hf_tokenseek import attach
from hf_tokenseek.lean.mlps import form_of
from hf_tokenseek.lemo.neurons import NeuronMlp
from hf_tokenseek.memory import SavedActivations
from tests.lemo.tiny_lemo import lemo, make_inputs
from tests.seek.tiny_families import tiny_model

TOLERANCE = 1e-12
# gated, fused and gated, not gated; with and without bias
FAMILIES = ("llama", "phi3", "starcoder2")


def frozen_mlp(family: str) -> nn.Module:
    mlp = tiny_model(family, torch.float64).base_model.layers[0].mlp
    return mlp.requires_grad_(False)


class MaskedColumns(torch.autograd.Function):
    """Hands on everything, and back the gradient of some columns."""

    @staticmethod
    def forward(ctx, states, mask):
        ctx.mask = mask
        return states.view_as(states)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.mask, None


def naive(mlp: nn.Module, x: torch.Tensor, share: float) -> torch.Tensor:
    """Written out, with the columns' sizes taken over all tokens."""
    form = form_of(mlp)
    states = [getattr(mlp, name)(x) for name in form.inner]
    if form.fused:
        states = states[0].chunk(2, -1)
    active = getattr(mlp, form.activation)(states[0])
    sizes = sum(part.detach().flatten(0, -2).double().norm(dim=0) for part in (active, *states[1:]))
    mask = torch.zeros_like(sizes)
    mask[sizes.argsort(descending=True)[: max(1, int(share * len(sizes)))]] = 1
    return getattr(mlp, form.down)(MaskedColumns.apply(active * states[1] if len(states) > 1 else active, mask))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_backward_is_that_of_the_largest_columns(family, share):
    mlp = frozen_mlp(family)
    x = torch.randn(2, 7, 64, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 7, 64, dtype=torch.float64)
    plain = mlp(x)
    expected = torch.autograd.grad(naive(mlp, x, share), x, upstream)[0]
    patched = NeuronMlp(mlp, share)
    output = mlp(x)
    found = torch.autograd.grad(output, x, upstream)[0]
    patched.undo()
    assert torch.equal(output, plain)
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
    if share == 1:
        torch.testing.assert_close(found, torch.autograd.grad(mlp(x), x, upstream)[0], rtol=TOLERANCE, atol=TOLERANCE)
    assert "forward" not in vars(mlp)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_backward_under_autocast_is_that_of_the_plain_mlp(share):
    """Weights and input in float32, as the Trainer's `bf16=True` has them."""
    mlp = frozen_mlp("llama").float()
    x = torch.randn(2, 7, 64, requires_grad=True)
    upstream = torch.randn(2, 7, 64, dtype=torch.bfloat16)

    def gradient(run):
        with torch.autocast("cpu", torch.bfloat16):
            output = run(x)
        return torch.autograd.grad(output, x, upstream)[0]

    expected = gradient(lambda x: naive(mlp, x, share))
    patched = NeuronMlp(mlp, share)
    found = gradient(mlp)
    patched.undo()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02 * expected.abs().max().item())


@pytest.mark.parametrize("seek", [None, {"context": 0.5, "plain_fallback": False}])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_padding_changes_no_gradient(seek, checkpointing):
    def gradients(inputs):
        torch.manual_seed(0)
        model = tiny_model("llama", torch.float64).requires_grad_(False)
        for layer in model.base_model.layers:
            layer.self_attn.requires_grad_(True)
        if checkpointing:
            model.gradient_checkpointing_enable()
        with attach(model, seek=seek, lemo=lemo(mlp="neurons", neurons=0.3)):
            model(**inputs).loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    inputs = make_inputs("whole")
    padded = {name: nn.functional.pad(value, (0, 14), value=7) for name, value in inputs.items()}
    padded["labels"][:, -14:] = -100
    padded["attention_mask"] = nn.functional.pad(torch.ones_like(inputs["input_ids"]), (0, 14))
    for alone, beside in zip(gradients(inputs), gradients(padded), strict=True):
        torch.testing.assert_close(alone, beside, rtol=1e-9, atol=1e-12)


def test_saves_the_kept_columns_alone():
    mlp = frozen_mlp("llama")
    x = torch.randn(2, 7, 64, dtype=torch.float64, requires_grad=True)
    patched = NeuronMlp(mlp, 0.25)
    with SavedActivations(mlp) as saved:
        output = mlp(x)
    patched.undo()
    assert output.requires_grad
    columns = mlp.gate_proj.out_features // 4
    assert saved.bytes == columns * (2 * 14 * 8 + 8)


def test_training_mlps_are_refused():
    with pytest.raises(ValueError, match="they train. Freeze them"):
        attach(tiny_model("llama"), lemo=lemo(mlp="neurons"))


def test_unknown_mlps_are_refused():
    model = tiny_model("llama").requires_grad_(False)
    layer = model.base_model.layers[-1]
    layer.mlp.down_proj = nn.Sequential(layer.mlp.down_proj)
    with pytest.raises(ValueError, match="plain linear layers"):
        attach(model, lemo=lemo(mlp="neurons"))
    # nothing is left behind by an attachment that failed
    assert all("forward" not in vars(module) for module in model.modules())


def test_model_with_all_columns_is_that_with_dense_mlps():
    model = tiny_model("llama").requires_grad_(False)
    for layer in model.base_model.layers:
        layer.self_attn.requires_grad_(True)
    gradients = []
    for fields in ({"mlp": "dense"}, {"mlp": "neurons", "neurons": 1.0}):
        with attach(model, lemo=lemo(**fields)):
            model(**make_inputs("right")).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    assert len(gradients[0]) == len(gradients[1]) > 0
    for dense, kept in zip(*gradients, strict=True):
        torch.testing.assert_close(kept, dense, rtol=1e-5, atol=1e-7)
