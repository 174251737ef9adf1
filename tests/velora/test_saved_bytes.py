"""What VeLoRA saves, counted: the width of each input less its columns, once a tensor, and nothing else changes."""

import pytest
import torch

from hf_tokenseek import attach
from hf_tokenseek.memory import SavedActivations
from hf_tokenseek.velora.telemetry import Telemetry
from tests.peft.tiny_peft import adapted, lora
from tests.velora.tiny_velora import batch, model

LAYERS, HIDDEN, INNER = 2, 64, 128
EVERYWHERE = {"target_modules": "all-linear"}
NAMES = ("attention", "mlp", "down")
WIDTHS = {"attention": HIDDEN, "mlp": HIDDEN, "down": INNER}
READERS = {"attention": 3, "mlp": 2, "down": 1}
TOKENS = 3 * 17


def peft(dtype=torch.float32, **options):
    return adapted(model(dtype=dtype), lora(**EVERYWHERE, **options))


def saved(tiny, velora=None, **options):
    """Bytes that autograd keeps of a forward, and the rows of it that have gradients."""
    if velora is None and not options:
        with SavedActivations(tiny) as counted:
            loss = tiny(**batch()).loss
        return counted.bytes if loss.requires_grad else None
    with attach(tiny, velora=velora, **options) as handle:
        if velora is not None:
            tiny(**batch())  # draws the directions, which later forwards have
        with SavedActivations(tiny) as counted:
            loss = tiny(**batch()).loss
        found = counted.bytes
        rows = handle.selection.numel() if handle.seek is not None else None
        if velora is not None:
            found -= kept_directions(handle)
        assert loss.requires_grad
    return found if rows is None else (found, rows)


def kept_directions(handle) -> int:
    """They are the handle's, whoever keeps them for backward."""
    return sum(c.projector.expansion.untyped_storage().nbytes() for c in handle.velora.inputs.values())


@pytest.mark.parametrize("itemsize", [4, 8, 2])
@pytest.mark.parametrize("inputs", [("down",), ("attention",), ("mlp",), NAMES], ids="+".join)
@pytest.mark.parametrize("options", [{"groups": 4}, {"groups": 8, "projector": "mixed", "rank": 3}])
def test_full_tuning_saves_the_width_less_the_columns(options, inputs, itemsize):
    """`N (D b - G r b)` an input, once for all layers that read it."""
    dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[itemsize]
    tiny = model(dtype=dtype)
    before, after = saved(tiny), saved(tiny, {**options, "inputs": inputs})
    columns = options["groups"] * options.get("rank", 1)
    expected = LAYERS * sum(TOKENS * itemsize * (WIDTHS[name] - columns) for name in inputs)
    # Llama's norm hands on a product, and the MLP another: both are kept for nobody else
    assert before - after == expected


def test_groups_that_do_not_divide_the_width():
    tiny = model(dtype=torch.float32)
    # 128 features in 5 groups are 26, 26, 26, 26 and 24; in 60 groups 43 of 3
    for groups, columns in ((5, 5), (60, 43)):
        found = saved(tiny) - saved(tiny, {"groups": groups, "inputs": ["down"]})
        assert found == LAYERS * TOKENS * 4 * (INNER - columns)


def test_an_input_that_somebody_keeps_costs_more():
    """V15: query alone adds its columns to what key and value keep."""
    tiny = model("cohere", torch.float32)
    before = saved(tiny)
    after = saved(tiny, {"groups": 4, "inputs": ["attention", "down"], "force": True})
    width = tiny.config.hidden_size
    assert after - before == len(tiny.model.layers) * TOKENS * 4 * (4 - (tiny.config.intermediate_size - 4))
    both = saved(tiny, {"groups": 4, "inputs": ["attention", "mlp"]})
    assert before - both == len(tiny.model.layers) * TOKENS * 4 * (width - 4)


@pytest.mark.parametrize("kind", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
def test_adapters_share_one_z(kind):
    tiny = peft(**kind)
    found = saved(tiny) - saved(tiny, {"groups": 4})
    assert found == LAYERS * TOKENS * 4 * sum(WIDTHS[name] - 4 for name in NAMES)


def test_two_adapters_share_one_z():
    tiny = peft()
    tiny.add_adapter("second", lora(**EVERYWHERE))
    tiny.base_model.set_adapter(["default", "second"])
    found = saved(tiny) - saved(tiny, {"groups": 4})
    assert found == LAYERS * TOKENS * 4 * sum(WIDTHS[name] - 4 for name in NAMES)


def test_casts_for_adapters_share_one_z():
    """Each adapter in float32 keeps its own cast of a bfloat16 input; VeLoRA one z, in bfloat16."""
    tiny = peft(torch.bfloat16)
    found = saved(tiny) - saved(tiny, {"groups": 4})
    assert found == LAYERS * TOKENS * sum(4 * WIDTHS[name] * READERS[name] - 2 * 4 for name in NAMES)


def test_under_dropout_every_adapter_has_its_own_z_and_a_seed():
    """In place of a dropped copy, and of torch's mask: as wide, one byte a feature on a CPU that keeps booleans."""
    tiny = peft(lora_dropout=0.1)
    masks = saved(tiny) - saved_without_masks(tiny)
    found = saved(tiny) - saved(tiny, {"groups": 4})
    copies = LAYERS * TOKENS * 4 * sum(READERS[name] * (WIDTHS[name] - 4) for name in NAMES)
    # what the first layer's attention reads, frozen embeddings, has no gradient
    seeds = (LAYERS * sum(READERS.values()) - READERS["attention"]) * 8
    assert found == copies + masks - seeds


def saved_without_masks(tiny) -> int:
    """Bytes without those of torch's dropout masks in front of the adapters that VeLoRA compresses."""
    dropouts = [m for name, m in tiny.named_modules() if type(m) is torch.nn.Dropout and "o_proj" not in name]

    class NoMask(torch.nn.Dropout):
        def forward(self, x):
            # a copy, as dropout makes
            return x * 1.0

    for module in dropouts:
        module.__class__ = NoMask
    found = saved(tiny)
    for module in dropouts:
        module.__class__ = torch.nn.Dropout
    return found


def test_frozen_layers_cost_as_much_as_before():
    tiny = adapted(model(dtype=torch.float32), lora(target_modules=["q_proj", "v_proj", "o_proj"]))
    found = saved(tiny) - saved(tiny, {"groups": 4, "inputs": ["attention"]})
    assert found == LAYERS * TOKENS * 4 * (HIDDEN - 4)


def test_a_compressed_state_saves_the_same_activations():
    tiny = model(dtype=torch.float32)
    dense = saved(tiny, {"groups": 4})
    assert saved(tiny, {"groups": 4, "compressed_state": True}) == dense


def test_a_probe_keeps_the_inputs_for_one_micro_batch():
    tiny = model(dtype=torch.float32)
    with attach(tiny, velora={"groups": 4, "probe_steps": 2}) as handle:
        counts = []
        for step in (0, 0, 1):
            handle.velora.begin_step(step)
            with SavedActivations(tiny) as counted:
                loss = tiny(**batch()).loss
            counts.append(counted.bytes)
        del loss
    assert counts[0] - counts[1] == LAYERS * TOKENS * 4 * (2 * HIDDEN + INNER) and counts[1] == counts[2]


@pytest.mark.parametrize("build", [model, peft], ids=["full", "lora"])
def test_with_lean_layers(build):
    """Norms and MLPs that recompute keep what they need, and the inputs of linear layers are gone as well."""
    tiny = build(dtype=torch.float32)
    lean, both = saved(tiny, lean=True), saved(tiny, {"groups": 4}, lean=True)
    alone, plain = saved(tiny, {"groups": 4}), saved(tiny)
    # a lean MLP never keeps the input of down, so that there VeLoRA adds its columns
    expected = LAYERS * TOKENS * 4 * (2 * (HIDDEN - 4) - 4)
    assert lean - both == expected and both < alone < plain


@pytest.mark.parametrize("build", [model, peft], ids=["full", "lora"])
@pytest.mark.parametrize("lean", [False, True], ids=["plain", "lean"])
def test_with_token_selection_only_selected_rows_are_kept(build, lean):
    """`k` rows in place of `n`, of each of them the columns."""
    tiny, seek = build(dtype=torch.float32), {"context": 0.2, "labelled": 0.3, "plain_fallback": False}
    alone, rows = saved(tiny, seek=seek, lean=lean)
    both, same = saved(tiny, {"groups": 4}, seek=seek, lean=lean)
    down = -4 if lean else INNER - 4
    assert rows == same < TOKENS
    assert alone - both == LAYERS * rows * 4 * (2 * (HIDDEN - 4) + down)


@pytest.mark.filterwarnings("ignore:.*checkpointing")
@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("lean", [False, True], ids=["plain", "lean"])
def test_an_input_is_compressed_once_a_pass(lean, reentrant, monkeypatch):
    """Whoever offers it, and also where checkpointing drops what a forward saves; the log says the same of all."""
    calls, observe = [], Telemetry.observe_input

    def spy(self, x, z):
        calls.append(x.shape)
        observe(self, x, z)

    monkeypatch.setattr(Telemetry, "observe_input", spy)
    tiny = model(dtype=torch.float32)
    if reentrant is not None:
        tiny.gradient_checkpointing_enable({"use_reentrant": reentrant})
        tiny.enable_input_require_grads()
    with attach(tiny, velora={"groups": 4}, lean=lean) as handle:
        for _ in range(2):
            tiny(**batch()).loss.backward()
        figures = handle.velora.telemetry.read()
    # without gradients in a reentrant forward, only when it is computed again
    assert len(calls) == 2 * LAYERS * len(NAMES) * (2 if reentrant is False else 1)
    expected = LAYERS * TOKENS * 4 * sum(WIDTHS[name] - 4 for name in NAMES)
    assert figures["velora/saved_mib"] * 2**20 == pytest.approx(expected, rel=1e-12)
