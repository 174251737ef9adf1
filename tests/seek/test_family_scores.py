"""What scores read of a model, in every supported family: attention given away, gradients in the last block."""

import pytest
import torch
import torch.nn.functional as F

from hf_tokenseek import attach
from hf_tokenseek.families import SUPPORTED
from hf_tokenseek.patching import find_layers
from hf_tokenseek.seek.batch import IGNORE
from tests.seek.tiny_families import tiny_model

N = 20
IDS = torch.randint(5, 60, (2, N), generator=torch.Generator().manual_seed(0))
LABELS = IDS.masked_fill(torch.arange(N) < 12, IGNORE)


def trained(model, score: str):
    """A step by a score: the micro-batch, and what became of it."""
    seen = []
    with attach(model, seek={"ratio": 0.4, "score": score, "plain_fallback": False}) as handle:
        handle.seek.observers.append(lambda batch, done: seen.append((batch, done)))
        loss = model(input_ids=IDS, labels=LABELS).loss
        loss.backward()
        heads = handle.seek.decoder.heads * len(handle.seek.decoder.layers)
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    [(batch, done)] = seen
    return batch, done, heads


@pytest.mark.parametrize("score", ["evidence", "context"])
@pytest.mark.parametrize("family", SUPPORTED)
def test_queries_give_away_all_of_their_attention(family, score):
    """One a query, a head and a layer; less where a sink takes some. A token gets none from those before it."""
    model = tiny_model(family).train()
    batch, done, heads = trained(model, score)
    voters = (batch.targets != IGNORE).sum(1) if score == "evidence" else torch.full((2,), N)
    total, most = done.scouted.mass.sum(1), (heads * voters).float()
    if any("sink" in name for name, _ in model.named_parameters()):
        assert (total < most).all() and (total > 0.5 * most).all()
    else:
        torch.testing.assert_close(total, most, rtol=1e-4, atol=0)
    assert (done.scouted.mass[:, 0] > 0).all()


@pytest.mark.parametrize("family", SUPPORTED)
def test_gradients_of_the_papers_score_are_those_of_the_plain_model(family):
    """Identity 8."""
    model, found = tiny_model(family).train(), {}
    _, layers = find_layers(model)

    def keep(layer, args, kwargs):
        found["input"] = args[0] if args else kwargs["hidden_states"]
        found["input"].retain_grad()

    # scouting knows no dropout
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    hook = layers[-1].register_forward_pre_hook(keep, with_kwargs=True)
    logits = model(input_ids=IDS, use_cache=False).logits.float()
    hook.remove()
    F.cross_entropy(logits[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten(), reduction="sum").backward()
    truth = found["input"].grad
    if truth.dim() == 4:
        # gemma3n's residual streams, side by side
        truth = torch.cat(list(truth), dim=-1)
    model.zero_grad()
    _, done, _ = trained(model, "paper")
    scale = truth.abs().max()
    torch.testing.assert_close(done.scouted.block_gradient / scale, truth / scale, rtol=1e-3, atol=1e-4)
