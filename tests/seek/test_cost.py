import pytest
import torch
from torch import nn

from hf_tokenseek.seek.cost import Cost


class Model(nn.Module):
    def __init__(self, trained, frozen, checkpointed=False):
        super().__init__()
        self.trained = nn.Parameter(torch.zeros(trained))
        self.frozen = nn.Parameter(torch.zeros(frozen), requires_grad=False)
        # transformers sets the flag on every layer that can be checkpointed
        self.layer = nn.Identity()
        self.layer.gradient_checkpointing = checkpointed


@pytest.mark.parametrize(
    ("model", "plain", "break_even"),
    [
        (Model(10, 0), 3, 2 / 3),
        (Model(10, 0, checkpointed=True), 4, 3 / 4),
        (Model(0, 10), 2, 1 / 2),
        (Model(5, 5), 2.5, 3 / 5),
        (Model(0, 10, checkpointed=True), 3, 2 / 3),
    ],
    ids=["full", "checkpointed", "frozen", "half", "frozen checkpointed"],
)
def test_forward_backward_weights_and_recompute(model, plain, break_even):
    cost = Cost.of(model)
    assert cost.plain == plain
    assert cost.break_even == pytest.approx(break_even)
    # the share at which both cost the same: below it TokenSeek is cheaper, above it dearer
    assert cost.seek(cost.break_even) == pytest.approx(plain)
    assert cost.seek(0.9 * cost.break_even) < plain < cost.seek(1.1 * cost.break_even)


def test_the_published_figure():
    """15 % of the rows of a fully trained model: 1 + 3 * 0.15 forwards instead of 3."""
    assert Cost.of(Model(7, 0)).seek(0.15) == pytest.approx(1.45)


def test_a_model_without_parameters():
    assert Cost.of(nn.Module()).plain == 2
