"""Every family that LeMo trains, against the plain layers with what is dropped masked out."""

import pytest
import torch

from hf_tokenseek import attach
from hf_tokenseek.families import MIXES_PACKED, SUPPORTED
from hf_tokenseek.lemo.refusals import REFUSED
from hf_tokenseek.patching import find_layers
from tests.lemo.naive import naive_lemo
from tests.lemo.test_first_norm import assert_same_step, fused, lean_step  # noqa: F401
from tests.lemo.tiny_lemo import lemo, make_inputs
from tests.seek.tiny_families import tiny_model

# as in tests/seek/test_families.py: twenty sums of 256 products in another order
TOLERANCE = 20 * 16 * 2**-24
LAYOUTS = ("whole", "left", "right", "packed")
REPRESENTATIVES = ("llama", "gemma2", "gpt_oss", "qwen3_moe", "deepseek_v3", "gpt2")
CASES = [(family, layout) for family in REPRESENTATIVES for layout in LAYOUTS]
CASES += [(family, "right") for family in SUPPORTED if family not in (*REPRESENTATIVES, *REFUSED)]


def gradients(model, loss) -> dict[str, torch.Tensor]:
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize(("family", "layout"), CASES)
@pytest.mark.parametrize("mode", ["elide", "detach"])
def test_equals_masked_layers(family, layout, mode):
    if layout == "packed" and family in MIXES_PACKED:
        pytest.skip("the plain model mixes packed documents")
    model, inputs = tiny_model(family, smooth=True), make_inputs(layout)
    with attach(model, lemo=lemo(mode=mode, loss="all")) as handle:
        loss = model(**inputs).loss
        found = gradients(model, loss)
        rows = {index: kept.rows for index, kept in handle.lemo.elimination.kept.items()}
    assert len(rows) == len(handle.lemo.shares)
    expected_loss = naive_lemo(model, rows, inputs, mode).loss
    expected = gradients(model, expected_loss)
    torch.testing.assert_close(loss, expected_loss, rtol=TOLERANCE, atol=TOLERANCE)
    assert found.keys() == expected.keys()
    # a key's bias changes no softmax: its gradient is rounding alone, of sums like those of its neighbours
    noise = max(gradient.abs().max().item() for gradient in expected.values()) / 100
    for name, gradient in expected.items():
        scale = max(gradient.abs().max().item(), noise)
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=10 * TOLERANCE * scale, msg=name)


# of these lean layers swap nothing; a norm without a weight saves as little in float32 as ours
NOT_LEAN = ("biogpt", "ctrl", "dbrx", "gpt2", "modernbert-decoder", "opt", "phimoe")
NOT_SWAPPED = ("nanochat",)


@pytest.mark.parametrize("family", [family for family in SUPPORTED if family not in (*REFUSED, *NOT_LEAN)])
def test_rows_and_first_norms_in_one_kernel(fused, family):  # noqa: F811
    found = lean_step(model := tiny_model(family, smooth=True), make_inputs("right"))
    _, layers = find_layers(model)
    taken, norms = len(fused), {type(getattr(layer, "input_layernorm", None)).__name__ for layer in layers}
    fused.stop()
    assert_same_step(found, lean_step(model, make_inputs("right")))
    # all layers have such a norm in front of attention, or none
    has = all(name.endswith("RMSNorm") for name in norms) and family not in NOT_SWAPPED
    assert taken == (len(layers) if has else 0), norms


@pytest.mark.parametrize("family", REFUSED)
def test_refused_families(family):
    with pytest.raises(ValueError, match="LeMo does not support"):
        attach(tiny_model(family), lemo=lemo())
