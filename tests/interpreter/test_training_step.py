"""A whole TokenSeek training step through the Triton kernels: loss and every gradient are those of the torch path."""

from typing import NamedTuple

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from triton.runtime.jit import KernelInterface

from hf_tokenseek import SeekConfig, attach
from tests.lemo.tiny_lemo import lemo
from tests.seek.tiny_families import tiny_model
from tokenseek_kernels import dispatch

# older versions know no other name
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")

VOCABULARY, LENGTH = 64, 24
SEEK_OPERATIONS = {"selected_attention", "attention_mass", "linear_cross_entropy"}
LEAN_OPERATIONS = {"lean_norm", "lean_mlp"}
# A sum of up to 256 products in another order differs by about sqrt(256) float32 roundings of 2^-24; some twenty such
# sums lie one after the other between an embedding and its gradient.
TOLERANCE = 20 * 16 * 2**-24


class Step(NamedTuple):
    """What one training step leaves behind, and the operations whose kernels ran."""

    loss: torch.Tensor
    selection: torch.Tensor | None
    gradients: dict[str, torch.Tensor]
    operations: set[str]


@pytest.fixture
def run_step(device, monkeypatch):
    """Runs one step of `model` on `batch` through one of the two implementations, whatever the device."""
    operations = set()
    launch = KernelInterface.__getitem__

    def recording(kernel, grid):
        operations.add(kernel.fn.__module__.split(".")[1])
        return launch(kernel, grid)

    monkeypatch.setattr(KernelInterface, "__getitem__", recording)

    def run(model, batch, seek, implementation, autocast=False, **methods) -> Step:
        # the one place where "auto" is decided
        monkeypatch.setattr(dispatch, "TRITON_DEVICES", (device,) if implementation == "triton" else ())
        operations.clear()
        model.zero_grad()
        with attach(model, seek=seek, **methods) as handle:
            with torch.autocast(device, torch.bfloat16, enabled=autocast):
                loss = model(**batch).loss
            loss.backward()
            selection = handle.selection if seek else None
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return Step(loss.detach(), selection, gradients, set(operations))

    return run


def tiny_llama(device):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(device).train()


def make_batch(layout, device):
    """Two sequences (packed: one of three documents) whose last tokens are labels."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (1 if layout == "packed" else 2, LENGTH), generator=generator)
    at = torch.arange(LENGTH).expand_as(ids)
    batch = {"input_ids": ids, "labels": ids.masked_fill(at < LENGTH - 8, -100)}
    if layout == "packed":
        starts = torch.tensor([0] * 7 + [7] * 11 + [18] * 6)
        batch |= {"position_ids": at - starts, "labels": ids.masked_fill((at - starts) < 3, -100)}
    elif layout != "full":
        # the second sequence is shorter
        real = at >= torch.tensor([[0], [7]]) if layout == "left" else at < torch.tensor([[LENGTH], [LENGTH - 5]])
        batch |= {"attention_mask": real.long(), "labels": batch["labels"].masked_fill(~real, -100)}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def assert_same_step(kernels, torchs):
    assert (kernels.selection is None) == (torchs.selection is None)
    if torchs.selection is not None:
        assert torch.equal(kernels.selection, torchs.selection)
    torch.testing.assert_close(kernels.loss, torchs.loss, rtol=TOLERANCE, atol=0)
    assert kernels.gradients.keys() == torchs.gradients.keys()
    for name, expected in torchs.gradients.items():
        distance, largest = (kernels.gradients[name] - expected).abs().max(), expected.abs().max()
        assert largest > 0 and distance <= TOLERANCE * largest, name


@pytest.mark.parametrize(
    ("layout", "checkpointing"),
    [("full", False), ("right", False), ("left", False), ("packed", False), ("full", True), ("packed", True)],
)
def test_a_step_equals_that_of_torch(run_step, device, layout, checkpointing):
    model, batch = tiny_llama(device), make_batch(layout, device)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    seek = SeekConfig(context=0.3, plain_fallback=False)
    kernels, torchs = (run_step(model, batch, seek, way) for way in ("triton", "torch"))
    assert kernels.operations == SEEK_OPERATIONS
    assert torchs.operations == set()
    assert len(torchs.gradients) == len(list(model.parameters()))
    assert_same_step(kernels, torchs)


@pytest.mark.parametrize("score", ["hybrid", "paper"])
def test_a_step_with_every_score_of_the_head(run_step, device, score):
    """`hybrid` reads the head's statistics, `paper` differentiates the last block in the scouting pass."""
    model, batch = tiny_llama(device), make_batch("right", device)
    seek = SeekConfig(ratio=0.7, score=score, plain_fallback=False)
    kernels, torchs = (run_step(model, batch, seek, way) for way in ("triton", "torch"))
    assert kernels.operations == SEEK_OPERATIONS
    assert_same_step(kernels, torchs)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_a_step_with_softcap_window_and_sinks(run_step, device, family):
    model, batch = tiny_model(family).to(device), make_batch("right", device)
    seek = SeekConfig(context=0.3, plain_fallback=False)
    kernels, torchs = (run_step(model, batch, seek, way) for way in ("triton", "torch"))
    assert kernels.operations == SEEK_OPERATIONS
    assert_same_step(kernels, torchs)


@pytest.mark.parametrize("lean_only", [False, True])
def test_a_step_with_lean_layers(run_step, device, lean_only):
    model, batch = tiny_llama(device), make_batch("right", device)
    seek = None if lean_only else SeekConfig(context=0.3, plain_fallback=False)
    kernels, torchs = (run_step(model, batch, seek, way, lean=True) for way in ("triton", "torch"))
    assert kernels.operations == LEAN_OPERATIONS | (set() if lean_only else SEEK_OPERATIONS)
    assert torchs.operations == set()
    assert_same_step(kernels, torchs)


@pytest.mark.parametrize("seek", [None, SeekConfig(context=0.3, plain_fallback=False)], ids=["alone", "with seek"])
@pytest.mark.parametrize("lean", [False, True], ids=["plain layers", "lean"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss"])
def test_a_step_of_layers_that_drop_tokens(run_step, device, family, lean, seek):
    """Windows that hide kept tokens from each other; with lean layers rows and norms in one."""
    model, batch = tiny_model(family).to(device), make_batch("right", device)
    kernels, torchs = (run_step(model, batch, seek, way, lemo=lemo(), lean=lean) for way in ("triton", "torch"))
    windows = {"selected_attention"} if family != "llama" else set()
    rows = {"token_rows"} | ({"normed_rows", "lean_norm"} if lean else set())
    assert rows | windows | (SEEK_OPERATIONS if seek else set()) <= kernels.operations
    assert torchs.operations == set()
    assert_same_step(kernels, torchs)


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16 weights", "autocast"])
def test_a_bfloat16_step_is_as_close_to_float32_as_that_of_torch(run_step, device, autocast):
    model, batch = tiny_llama(device), make_batch("right", device)
    # every row, so that rounding cannot change the selection
    seek = SeekConfig(context=1.0, plain_fallback=False)
    exact = run_step(model, batch, seek, "torch")
    if not autocast:
        model.bfloat16()
    kernels, torchs = (run_step(model, batch, seek, way, autocast) for way in ("triton", "torch"))
    assert kernels.operations == SEEK_OPERATIONS

    def distances(step):
        return {
            name: ((gradient.float() - exact.gradients[name]).norm() / exact.gradients[name].norm()).item()
            for name, gradient in step.gradients.items()
        }

    # twice the error of the same precision, and one rounding of 2^-9
    limits = {name: 2 * distance + 2**-9 for name, distance in distances(torchs).items()}
    too_far = {name: distance for name, distance in distances(kernels).items() if distance > limits[name]}
    assert not too_far, limits
    assert abs(kernels.loss - exact.loss) <= 2 * abs(torchs.loss - exact.loss) + 2**-9 * exact.loss
