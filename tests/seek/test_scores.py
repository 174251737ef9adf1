import copy

import pytest
import torch
import torch.nn.functional as F

from hf_tokenseek import attach
from hf_tokenseek.seek import SeekConfig
from hf_tokenseek.seek.batch import IGNORE, prepare
from hf_tokenseek.seek.scores import SCORE_FUNCTIONS, Scouted, uniform_mass
from hf_tokenseek.seek.select import labelled_rows
from tests.seek.tiny_families import tiny_model
from tokenseek_kernels import HeadStatistics

N = 18
LAYOUTS = {
    "whole": {},
    "left": {"attention_mask": torch.tensor([[0] * 5 + [1] * 13, [1] * N])},
    "right": {"attention_mask": torch.tensor([[1] * 11 + [0] * 7, [1] * N])},
    "packed": {"position_ids": torch.tensor([[*range(7), *range(11)], [*range(15), *range(3)]])},
}


def make_inputs(layout):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 128, (2, N), generator=generator)
    labels = torch.where(torch.rand(2, N, generator=generator) < 0.6, ids, IGNORE)
    mask = LAYOUTS[layout].get("attention_mask")
    labels = labels if mask is None else labels.masked_fill(mask == 0, IGNORE)
    # a document's first token is nobody's target
    first = LAYOUTS[layout].get("position_ids", torch.ones(1, N)) == 0
    return {"input_ids": ids, "labels": labels.masked_fill(first, IGNORE), **LAYOUTS[layout]}


def read(inputs, config=None):
    parts = (inputs.get(name) for name in ("input_ids", "labels", "attention_mask", "position_ids"))
    return prepare(config or SeekConfig(), *parts)


def scout(model, inputs, score, queries=128, layers=None):
    """The scouting pass's findings."""
    config = SeekConfig(evidence_queries=queries, attention_layers=layers)
    with attach(model, seek=True) as handle:
        return handle.seek.decoder.scout(read(inputs), SCORE_FUNCTIONS[score], config)[1]


def dense(model, inputs):
    """The plain model, eagerly and with everything kept: attention maps, states with gradient, logits."""
    model = copy.deepcopy(model).eval()
    model.set_attn_implementation("eager")
    states = {}

    def keep(module, args, output):
        states["last_input"] = args[0]
        args[0].retain_grad()

    hook = model.model.layers[-1].register_forward_hook(keep)
    output = model.model(**{k: v for k, v in inputs.items() if k != "labels"}, output_attentions=True)
    hook.remove()
    states["hidden"] = output[0]
    output[0].retain_grad()
    logits = model.lm_head(output[0])
    targets = read(inputs).targets
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    losses.sum().backward()
    return torch.stack(output.attentions).detach(), states, logits.detach(), losses.detach(), targets


def real_of(inputs):
    return read(inputs).segments >= 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("score", ["evidence", "context", "paper", "hybrid"])
def test_mass_is_the_column_sum_of_dense_attention(tiny_llama, score, layout):
    """Identity 7."""
    model, inputs = tiny_llama(), make_inputs(layout)
    real = real_of(inputs)
    maps, *_, targets = dense(model, inputs)
    voters = targets != IGNORE if score == "evidence" else real
    layers = maps[-1:] if score == "paper" else maps
    truth = (layers * voters[None, :, None, :, None]).sum((0, 2, 3))
    mass = scout(model, inputs, score).mass
    torch.testing.assert_close(mass[real], truth[real], rtol=1e-5, atol=1e-6)
    assert (mass[~real] == 0).all()
    total = len(layers) * maps.shape[2] * voters.sum(1).float()
    torch.testing.assert_close(mass.sum(1), total, rtol=1e-5, atol=0)


def test_evidence_of_some_of_the_labelled_queries(tiny_llama):
    model, inputs = tiny_llama(), make_inputs("whole")
    maps = dense(model, inputs)[0]
    rows = labelled_rows(read(inputs), 3)
    truth = maps.sum((0, 2)).gather(1, rows[:, :, None].expand(-1, -1, N)).sum(1)
    torch.testing.assert_close(scout(model, inputs, "evidence", 3).mass, truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("score", ["evidence", "context", "hybrid"])
@pytest.mark.parametrize("layers", [[0], [-1], [2, 0], [0, 1, -1, 2]], ids=str)
def test_mass_of_chosen_layers(tiny_llama, layers, score):
    model, inputs = tiny_llama(), make_inputs("left")
    maps, *_, targets = dense(model, inputs)
    voters = targets != IGNORE if score == "evidence" else real_of(inputs)
    truth = sum((maps[layer] * voters[:, None, :, None]).sum((1, 2)) for layer in {layer % 3 for layer in layers})
    mass, real = scout(model, inputs, score, layers=layers).mass, real_of(inputs)
    torch.testing.assert_close(mass[real], truth[real], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layers", [[3], [0, -4]], ids=str)
def test_layers_that_a_model_does_not_have_are_refused(tiny_llama, layers):
    model = tiny_llama()
    with pytest.raises(ValueError, match=rf"`attention_layers` has {layers[-1]}, the model has 3 layers. Use 0 to 2"):
        attach(model, seek={"attention_layers": layers})
    attach(model, seek={"attention_layers": [-3, 2]}).undo()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_partial_backward_equals_full_autograd(tiny_llama, layout):
    """Identity 8."""
    model, inputs = tiny_llama(), make_inputs(layout)
    real = real_of(inputs)
    truth = dense(model, inputs)[1]["last_input"].grad
    found = scout(model, inputs, "paper")
    torch.testing.assert_close(found.block_gradient[real], truth[real], rtol=1e-4, atol=1e-7)
    assert not found.block_gradient.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.is_grad_enabled() and model.training and not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("score", ["evidence", "paper", "loss"])
def test_scouting_runs_without_dropout(score):
    inputs, found = make_inputs("left"), []
    for dropout in (0.0, 0.5):
        model = tiny_model("gpt2")
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = dropout
        scouted = scout(model, inputs, score)
        parts = (scouted.mass, scouted.block_gradient, *(scouted.head or ()))
        found.append([part for part in parts if part is not None])
        assert all(module.training for module in model.modules())
    assert found[0] and all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_head_scores(tiny_llama, layout):
    model, inputs = tiny_llama(), make_inputs(layout)
    real = real_of(inputs)
    _, states, logits, losses, _ = dense(model, inputs)
    head = scout(model, inputs, "gradient").head
    truths = {
        "loss": losses,
        "entropy": torch.distributions.Categorical(logits=logits).entropy(),
        "gradient": states["hidden"].grad.norm(dim=-1),
    }
    for name, truth in truths.items():
        score = SCORE_FUNCTIONS[name].compute(Scouted(head=head), read(inputs), SeekConfig(), None)
        torch.testing.assert_close(score[real], truth[real], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["count", "harmonic"])
@pytest.mark.parametrize("layout", [*LAYOUTS, "hole", "limits"])
def test_uniform_mass_by_loops(layout, kind):
    extra = {
        "hole": {"attention_mask": torch.tensor([[0, 1, 1, 0, 1, 1] * 3, [1, 1, 0] * 6])},
        "limits": {"cu_seq_lens": torch.tensor([0, 5, 6, 15])},
    }
    ids = torch.zeros(1 if layout == "limits" else 2, N, dtype=torch.long)
    batch = prepare(SeekConfig(), ids, ids, **{**LAYOUTS, **extra}[layout])
    truth = torch.ones(ids.shape)
    for b, segments in enumerate(batch.segments.tolist()):
        for j in (j for j in range(N) if segments[j] >= 0):
            queries = [i for i in range(j, N) if segments[i] == segments[j]]
            seen = [sum(segments[k] == segments[j] for k in range(i + 1)) for i in queries]
            truth[b, j] = len(queries) if kind == "count" else sum(1 / s for s in seen)
    torch.testing.assert_close(uniform_mass(batch, kind), truth)


def test_uniform_attention_scores_alike_after_the_correction():
    """The harmonic correction makes a model without any preference indifferent."""
    inputs = make_inputs("packed")
    batch = read(inputs)
    same = (batch.segments[:, :, None] == batch.segments[:, None]).float().tril()
    mass = (same / same.sum(-1, keepdim=True)).sum(1)
    config = SeekConfig(score="context", context_bias="harmonic")
    score = SCORE_FUNCTIONS["context"].compute(Scouted(mass), batch, config, None)
    torch.testing.assert_close(score, torch.ones_like(score))


PADDED = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])


def hand_made(**options):
    """Three sequences, the first with padding and the last of nothing else, with loud values on the padding."""
    config = SeekConfig(**options)
    ids = torch.zeros(3, 5, dtype=torch.long)
    batch = prepare(config, ids, ids, PADDED)
    mass = torch.tensor([[99.0, 4, 1, 2, 3], [5, 1, 2, 8, 2], [9, 9, 9, 9, 9]])
    norm = torch.tensor([[99.0, 0, 6, 2, 1], [3, 3, 3, 3, 3], [9, 9, 9, 9, 9]])
    gradient = norm[:, :, None] * torch.tensor([0.6, -0.8])
    scouted = Scouted(mass, HeadStatistics(norm, norm, norm), gradient, heads=4)
    return SCORE_FUNCTIONS[config.score].compute(scouted, batch, config, None), mass, norm


def test_hybrid_by_ranks():
    score = hand_made(score="hybrid", alpha=2.0, beta=10.0)[0]
    # four real positions: best 1, then 3/4, 1/2, 1/4; equals rank alike
    torch.testing.assert_close(score[0, 1:], torch.tensor([2 * 1 + 2.5, 0.5 + 10, 1 + 7.5, 1.5 + 5.0]))
    torch.testing.assert_close(score[1], torch.tensor([1.6, 0.4, 1.2, 2.0, 1.2]) + 10)


@pytest.mark.parametrize("mix", ["rank", "zscore"])
def test_hybrid_goes_by_attention_where_no_position_has_a_label(tiny_llama, mix):
    """Their gradients are all zero, which says nothing about which of them matters."""
    model, inputs = tiny_llama(), make_inputs("whole")
    inputs["labels"] = inputs["labels"].masked_fill(torch.arange(N) < N - 4, IGNORE)
    batch, found = read(inputs), scout(model, inputs, "hybrid")
    # causal attention favours early positions, and so would a rank among equals
    found.mass = found.mass.flip(1)
    score = SCORE_FUNCTIONS["hybrid"].compute(found, batch, SeekConfig(score="hybrid", mix=mix), None)
    for own, mass, targets in zip(score, found.mass, batch.targets, strict=True):
        free = targets == IGNORE
        assert torch.equal(own[free].argsort(), mass[free].argsort())


def test_hybrid_by_deviations():
    score, mass, norm = hand_made(score="hybrid", mix="zscore", alpha=2.0, beta=10.0)
    for b, own in enumerate((slice(1, None), slice(None))):
        terms = [(v[b, own] - v[b, own].mean()) / v[b, own].std(correction=0).clamp(min=1e-12) for v in (mass, norm)]
        torch.testing.assert_close(score[b, own], 2 * terms[0] + 10 * terms[1])


@pytest.mark.parametrize(("norm", "factor"), [("l2", 1.0), ("l1", 1.4), ("signed", -0.2)])
def test_paper_formula(norm, factor):
    """alpha * log(mean over heads) + beta * min-max over the real positions; a constant gradient adds nothing."""
    score, mass, norms = hand_made(score="paper", gradient_norm=norm, alpha=2.0, beta=3.0)
    values = norms[0, 1:] * factor
    scaled = (values - values.min()) / (values.max() - values.min())
    torch.testing.assert_close(score[0, 1:], 2 * (mass[0, 1:] / 4).log() + 3 * scaled)
    torch.testing.assert_close(score[1], 2 * (mass[1] / 4).log())


def test_recent_and_random():
    ids = torch.zeros(3, 5, dtype=torch.long)
    batch = prepare(SeekConfig(), ids, ids, PADDED)
    recent = SCORE_FUNCTIONS["recent"].compute(Scouted(), batch, SeekConfig(), None)
    assert recent[PADDED.bool()].tolist() == [1, 2, 3, 4, 0, 1, 2, 3, 4]
    draws = [
        SCORE_FUNCTIONS["random"].compute(Scouted(), batch, SeekConfig(), torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
