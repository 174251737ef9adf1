"""trl's loss, entropy and accuracy are those of the tokens that were trained, recomputed here from plain logits."""

import pytest
import torch
from datasets import Dataset
from trl import SFTTrainer

from hf_tokenseek import SeekCallback
from tests.sft.tiny_sft import SELECTS, arguments, logged, run

N, ANSWER = 24, 8
PACKED = {"padding_free": True, "max_length": None}
SEEKS = {
    "stages": SELECTS,
    "half the labels": {**SELECTS, "labelled": 0.5},
    "ratio": {"ratio": 0.5, "score": "random", "plain_fallback": False},
}


def half_right(model) -> Dataset:
    """Two sequences whose labels the model predicts at every other position, and does not at the others."""
    ids = torch.randint(8, 128, (2, N), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        best = model.eval()(input_ids=ids).logits.argmax(-1)
    labels = torch.full_like(ids, -100)
    labels[:, -ANSWER:] = torch.where(torch.arange(ANSWER) % 2 == 0, best[:, -ANSWER - 1 : -1], 5)
    # no sequence has as many labels as the other
    labels[1, -ANSWER:-3] = -100
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})


@pytest.mark.parametrize("layout", [{}, PACKED], ids=["padded", "padding-free"])
@pytest.mark.parametrize("seek", SEEKS.values(), ids=SEEKS)
def test_figures_are_those_of_the_trained_tokens(tiny_llama, tmp_path, seek, layout):
    data = half_right(tiny_llama())
    options = {"learning_rate": 0.0, "max_steps": 1, **layout}
    own = run(tiny_llama(), arguments(tmp_path, seek, **options), data)
    [callback] = [c for c in own.callback_handler.callbacks if isinstance(c, SeekCallback)]
    ids, labels = torch.tensor(data["input_ids"]), torch.tensor(data["labels"])
    with torch.no_grad():
        logits = tiny_llama().eval()(input_ids=ids).logits.log_softmax(-1)
    # the sampler has put the two sequences into an order of its own
    loader = next(iter(own.get_train_dataloader()))["input_ids"].flatten()[:N]
    order = [0, 1] if torch.equal(loader, ids[0]) else [1, 0]
    ids, labels, logits = ids[order], labels[order], logits[order]
    targets = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    kept = torch.zeros(2 * N, dtype=torch.bool)
    rows = callback.handle.selection
    offsets = torch.zeros(1, 1, dtype=torch.long) if layout else torch.tensor([[0], [N]])
    kept[(rows + offsets)[rows >= 0]] = True
    trained = kept.view(2, N) & (targets != -100)
    assert 0 < trained.sum() < (targets != -100).sum() or seek is SELECTS
    entropy = -(logits.exp() * logits).sum(-1)[trained].mean()
    right = (logits.argmax(-1) == targets)[trained].float().mean()
    nll = -logits.gather(2, targets.clamp(min=0)[..., None]).squeeze(2)
    # a sequence's kept losses stand for all of its losses; padding-free, everything is one sequence
    groups = (slice(None),) if layout else (0, 1)
    total = sum(nll[g][trained[g]].mean() * (targets[g] != -100).sum() for g in groups if trained[g].any())
    assert 0 < right < 1
    assert logged(own, "entropy")[0] == pytest.approx([float(entropy)], rel=1e-5)
    assert logged(own, "mean_token_accuracy")[0] == pytest.approx([float(right)], rel=1e-6)
    assert logged(own, "loss")[0] == pytest.approx([float(total / (targets != -100).sum())], rel=1e-5)
    assert logged(own, "num_tokens")[0] == [2 * N]


def test_dynamic_fine_tuning_weighs_each_token_by_its_probability(tiny_llama, tmp_path):
    """Against the formula, and the gradient against a stock run where everything is selected."""
    data = half_right(tiny_llama())
    options = {"learning_rate": 0.0, "max_steps": 1, "loss_type": "dft"}
    ids, labels = torch.tensor(data["input_ids"]), torch.tensor(data["labels"])[:, 1:]
    with torch.no_grad():
        logits = tiny_llama().eval()(input_ids=ids).logits.log_softmax(-1)[:, :-1]
    found = logits.gather(2, labels.clamp(min=0)[..., None]).squeeze(2)[labels != -100]
    expected = float(-(found * found.exp()).mean())
    for kind, seek in ((None, SELECTS), (SFTTrainer, "stock")):
        own = run(tiny_llama(), arguments(tmp_path, seek, **options), data, **({"kind": kind} if kind else {}))
        assert logged(own, "loss")[0] == pytest.approx([expected], rel=1e-5)
