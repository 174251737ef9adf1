"""`mlp="dense"`: attention runs on the kept tokens, the MLP on all of them."""

import pytest
import torch

from hf_tokenseek import attach
from tests.lemo.deep_lemo import assert_close_gradients, kept_rows
from tests.lemo.naive import naive_lemo
from tests.lemo.test_families import TOLERANCE, gradients
from tests.lemo.tiny_lemo import lemo, make_inputs
from tests.seek.tiny_families import tiny_model

# where norms stand in front, behind, or on both sides
FAMILIES = ("llama", "gemma2", "olmo2", "glm4", "gpt2")
ONE_SUM = ("cohere", "phi", "gpt_neox")


@pytest.mark.parametrize("layout", ["whole", "left", "right", "packed"])
@pytest.mark.parametrize("mode", ["elide", "detach"])
@pytest.mark.parametrize("family", FAMILIES)
def test_dropped_tokens_miss_the_attention_only(family, mode, layout):
    model, inputs = tiny_model(family, smooth=True), make_inputs(layout)
    with attach(model, lemo=lemo(mode=mode, mlp="dense", loss="all")) as handle:
        loss = model(**inputs).loss
        found, rows = gradients(model, loss), kept_rows(handle)
    expected = naive_lemo(model, rows, inputs, mode, mlp="dense")
    if mode == "elide":
        # layers that miss both are something else
        assert (naive_lemo(model, rows, inputs).logits - expected.logits).abs().max() > 1e-2
    torch.testing.assert_close(loss, expected.loss, rtol=TOLERANCE, atol=TOLERANCE)
    assert_close_gradients(found, gradients(model, expected.loss), 10 * TOLERANCE)


@pytest.mark.parametrize("batch", [1, 3])
def test_mlps_that_answer_with_a_pair_are_muted_too(batch):
    """gpt_oss; unpacked by mistake, a batch of two looks like a pair."""
    model, inputs = tiny_model("gpt_oss"), make_inputs("whole", batch=batch)
    plain = model(**inputs)
    with attach(model, lemo=lemo(mlp="dense", keep=0.5, sinks=99)):
        dense = model(**inputs)
    torch.testing.assert_close(dense.loss, plain.loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ONE_SUM)
def test_layers_with_one_residual_sum_are_refused(family):
    model = tiny_model(family)
    kind = type(model.base_model.layers[0]).__name__
    with pytest.raises(
        ValueError, match=rf"mlp='dense' needs a layer whose MLP follows its attention.*{kind}.*tokens"
    ):
        attach(model, lemo=lemo(mlp="dense"))
    assert not any("forward" in vars(layer) for layer in model.base_model.layers)
