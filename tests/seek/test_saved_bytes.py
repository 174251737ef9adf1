import pytest
import torch

from hf_tokenseek import SeekConfig, attach
from hf_tokenseek.memory import SavedActivations

LABELLED, LAYERS, KV_HEADS, HEAD_DIM, FLOAT = 3, 3, 2, 8, 4
# keys and values of one token in all layers
KV = LAYERS * 2 * KV_HEADS * HEAD_DIM * FLOAT


def saved(model, length, context, batch=1):
    """Bytes that autograd keeps, and the rows that were selected; at `context=1` the batch is trained plainly."""
    ids = torch.randint(0, 128, (batch, length))
    labels = torch.full_like(ids, -100)
    labels[:, -LABELLED:] = 5
    with attach(model, seek=SeekConfig(context=context)) as handle:
        with SavedActivations(model) as counted:
            loss = model(input_ids=ids, labels=labels).loss
        assert loss.requires_grad
        return counted.bytes, handle.selection.shape[1]


def checkpointed(model, reentrant):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model


@pytest.mark.parametrize("batch", [1, 3])
def test_linear_in_rows_with_a_floor_of_keys_and_values(tiny_llama, batch):
    """Identity 9."""
    model = tiny_llama()
    points = [saved(model, 60, context, batch) for context in (0.0, 0.1, 0.25, 0.5)]
    slopes = {(b - points[0][0]) / (k - points[0][1]) for b, k in points[1:]}
    assert len(slopes) == 1
    # the loss rows' hidden states, targets, log-sum-exp and weights: float32, int64, float32, float32
    head = batch * LABELLED * (32 * FLOAT + 8 + 4 + 4)
    floor = points[0][0] - points[0][1] * slopes.pop()
    assert floor == batch * 60 * KV + head


@pytest.mark.parametrize(("length", "context"), [(64, 0.05), (64, 0.3), (150, 0.2)])
def test_equals_a_plain_step_on_as_many_tokens(tiny_llama, length, context):
    """
    What plain training of k tokens saves, with everybody's keys and values in place of those of k tokens, the k row
    numbers (int64) and the weights of the loss rows (float32).
    """
    model = tiny_llama()
    found, rows = saved(model, length, context)
    plain, whole = saved(model, rows, 1.0)
    assert rows == whole < length / 2
    assert found == plain + (length - rows) * KV + 8 * rows + 4 * LABELLED


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_keeps_layer_inputs_and_the_keys_and_values(tiny_llama, reentrant):
    model = checkpointed(tiny_llama(), reentrant)
    found, rows = saved(model, 64, 0.2)
    plain, whole = saved(model, rows, 1.0)
    assert rows == whole
    # the row numbers live in a closure of the recompute, 8 bytes each
    assert found == plain + 64 * KV + 4 * LABELLED


def test_backward_lets_everything_go_but_the_selection(tiny_llama):
    model = tiny_llama()
    ids = torch.randint(0, 128, (1, 40))
    with attach(model, seek=True) as handle:
        with SavedActivations(model) as counted:
            loss = model(input_ids=ids, labels=ids.masked_fill(torch.arange(40) < 30, -100)).loss
        held = counted.bytes
        loss.backward()
        del loss
    assert counted.bytes == handle.selection.nbytes < held


@pytest.mark.parametrize("score", ["gradient", "paper"])
def test_scouting_leaves_nothing_behind(tiny_llama, score):
    """Whatever decides, the same rows cost the same."""
    model, sizes = tiny_llama(), set()
    ids = torch.randint(0, 128, (1, 40), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(40) < 30, -100)
    for name in (score, "recent"):
        with attach(model, seek=SeekConfig(score=name, ratio=0.4)), SavedActivations(model) as counted:
            loss = model(input_ids=ids, labels=labels).loss
            sizes.add(counted.bytes)
        del loss
    assert len(sizes) == 1
