import pytest
import torch

from hf_tokenseek import SeekConfig, attach
from hf_tokenseek.seek.batch import IGNORE, prepare
from tests.seek.budgets import scored
from tests.seek.naive import naive_loss

N = 24
BUDGETS = [{}, {"context": 0.0}, {"ratio": 0.3}, {"labelled": 0.5, "context": 0.2}]


def make_inputs(share=0.3, **inputs):
    """Three sequences of different lengths, labels towards the end."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, 128, (3, N), generator=generator)
    mask = (torch.arange(N) >= torch.tensor([[0], [7], [3]])).long()
    labels = ids.masked_fill(torch.arange(N) < N * (1 - share), IGNORE)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, **inputs}


def make_packed():
    """Two documents a sequence, positions counted anew in each, labels towards the end of the whole."""
    inputs = make_inputs()
    del inputs["attention_mask"]
    positions = [torch.cat([torch.arange(first), torch.arange(N - first)]) for first in (5, 11, 17)]
    return {**inputs, "position_ids": torch.stack(positions)}


def train(model, config, inputs):
    """Loss, gradients and selection of one micro-batch."""
    with attach(model, seek=config) as handle:
        loss = model(**inputs).loss
        return loss.detach(), torch.autograd.grad(loss, list(model.parameters())), handle.selection


def plain(model, inputs):
    loss = model(**inputs).loss
    return loss.detach(), torch.autograd.grad(loss, list(model.parameters()))


def assert_same(found, truth, **tolerance):
    """Loss and gradients, the latter against the largest of their parameter."""
    tolerance = {"rtol": 1e-5, "atol": 1e-5, **tolerance}
    torch.testing.assert_close(found[0], truth[0], **tolerance)
    for own, right in zip(found[1], truth[1], strict=True):
        scale = right.abs().max().clamp(min=1e-6)
        torch.testing.assert_close(own / scale, right / scale, **tolerance)


@pytest.mark.parametrize("config", [{"context": 1.0}, {"ratio": 1.0}, {"ratio": 1.0, "temperature": 1.0}], ids=str)
def test_everything_selected_is_plain_training(tiny_llama, config):
    """Identity 3."""
    inputs = make_inputs()
    found = train(tiny_llama(), SeekConfig(**config, plain_fallback=False), inputs)
    assert_same(found, plain(tiny_llama(), inputs))


@pytest.mark.parametrize(("score", "budget"), scored([{}, {"ratio": 0.3}, {"labelled": 0.5, "context": 0.0}]))
@pytest.mark.parametrize("make", [make_inputs, make_packed])
def test_gradient_is_that_of_the_plain_model_with_detached_rows(tiny_llama, make, score, budget):
    """Identities 2 and 6, for whatever was selected; kept losses stand for all losses of their sequence."""
    model, inputs = tiny_llama(), make()
    config = SeekConfig(**budget, score=score, plain_fallback=False)
    found = train(model, config, inputs)
    keep = torch.zeros(3, N, dtype=torch.bool)
    for sequence, rows in enumerate(found[2]):
        keep[sequence, rows[rows >= 0]] = True
    limits = inputs.get("attention_mask"), inputs.get("position_ids")
    batch = prepare(config, inputs["input_ids"], inputs["labels"], *limits)
    labelled = batch.targets != IGNORE
    counted = keep & labelled
    parts = []
    for sequence in range(3):
        targets = torch.where(counted, batch.targets, IGNORE)
        targets[torch.arange(3) != sequence] = IGNORE
        weight = labelled[sequence].sum() / counted[sequence].sum().clamp(min=1)
        parts.append(naive_loss(model, {k: v for k, v in inputs.items() if k != "labels"}, targets, keep) * weight)
    loss = sum(parts) / labelled.sum()
    truth = torch.autograd.grad(loss, list(model.parameters()))
    assert_same(found, (loss.detach(), truth), rtol=1e-4)


@pytest.mark.parametrize("items", [7, torch.tensor(7), torch.tensor(0), None])
def test_the_trainers_count_divides_the_loss(tiny_llama, items):
    inputs = make_inputs()
    mean = train(tiny_llama(), SeekConfig(), inputs)[0]
    found = train(tiny_llama(), SeekConfig(), {**inputs, "num_items_in_batch": items})[0]
    count = (inputs["labels"][:, 1:] != IGNORE).sum()
    divisor = count if items is None else max(1, int(items))
    torch.testing.assert_close(found, mean * count / divisor)


@pytest.mark.parametrize("config", [{}, {"context": 1.0, "plain_fallback": True}, *BUDGETS], ids=str)
def test_batch_equals_the_mean_of_its_sequences(tiny_llama, config):
    """Identity 5: padding and neighbours change nothing."""
    model, inputs, config = tiny_llama(), make_inputs(), SeekConfig(**{"plain_fallback": False, **config})
    count = int((inputs["labels"] != IGNORE).sum())
    together = train(model, config, {**inputs, "num_items_in_batch": count})
    singles = []
    for sequence in range(3):
        own = inputs["attention_mask"][sequence].bool()
        short = {k: v[sequence][own][None] for k, v in inputs.items() if k != "attention_mask"}
        singles.append(train(model, config, {**short, "num_items_in_batch": count}))
        rows = together[2][sequence]
        assert torch.equal(rows[rows >= 0] - own.int().argmax(), singles[-1][2][0])
    sums = sum(s[0] for s in singles), [sum(parts) for parts in zip(*(s[1] for s in singles), strict=True)]
    assert_same(together, sums)


def test_packed_documents_equal_their_own_sequences(tiny_llama):
    model, config = tiny_llama(), SeekConfig(context=1.0, plain_fallback=False)
    ids = make_inputs()["input_ids"][:1]
    labels = ids.clone()
    labels[:, [0, 9]] = IGNORE
    positions = torch.cat([torch.arange(9), torch.arange(N - 9)])[None]
    count = int((labels != IGNORE).sum())
    limits = torch.tensor([0, 9, N])
    parts = [
        train(model, config, {"input_ids": ids[:, s], "labels": labels[:, s], "num_items_in_batch": count})
        for s in (slice(0, 9), slice(9, N))
    ]
    sums = sum(p[0] for p in parts), [a + b for a, b in zip(parts[0][1], parts[1][1], strict=True)]
    packed = {"input_ids": ids, "labels": labels, "position_ids": positions, "num_items_in_batch": count}
    assert_same(train(model, config, packed), sums)
    assert_same(train(model, config, {**packed, "cu_seq_lens_q": limits, "max_length_q": N - 9}), sums)


@pytest.mark.parametrize(("score", "budget"), scored([*BUDGETS, {"context": 1.0}]))
def test_without_labels_the_loss_is_zero_and_connected(tiny_llama, score, budget):
    """Identity 6."""
    model = tiny_llama()
    inputs = make_inputs()
    inputs["labels"] = torch.full_like(inputs["labels"], IGNORE)
    with attach(model, seek=SeekConfig(score=score, **budget)) as handle:
        loss = model(**inputs).loss
        loss.backward()
        assert not any(value != value for value in handle.seek.metrics.read().values())
    assert loss == 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and (parameter.grad == 0).all(), name


def test_rows_without_a_label_give_a_loss_of_zero(tiny_llama):
    """Identity 6: there are labels, and the most recent rows have none of them."""
    model, inputs = tiny_llama(), make_inputs()
    inputs["labels"] = inputs["input_ids"].masked_fill(torch.arange(N) > 10, IGNORE)
    loss, gradients, rows = train(model, SeekConfig(ratio=0.2, score="recent"), inputs)
    assert (inputs["labels"] != IGNORE).any() and rows[rows >= 0].min() > 10
    assert loss == 0 and all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize(("score", "budget"), scored(BUDGETS))
def test_a_sequence_of_padding_adds_nothing(tiny_llama, score, budget):
    inputs = make_inputs()
    inputs["attention_mask"][1] = 0
    config = SeekConfig(score=score, plain_fallback=False, **budget)
    found = train(tiny_llama(), config, inputs)
    assert (found[2][1] == -1).all()
    others = {k: v[[0, 2]] for k, v in inputs.items()}
    if score != "random":
        assert_same(found, train(tiny_llama(), config, others))
    assert found[0].isfinite() and all(g.isfinite().all() for g in found[1])


@pytest.mark.parametrize("budget", [{"context": 0.7}, {"ratio": 0.9}], ids=str)
def test_where_selection_cannot_pay_training_is_plain(tiny_llama, budget):
    model, inputs = tiny_llama(), make_inputs(share=0.8)
    # the plain model would predict a sequence's first token from the padding before it, TokenSeek does not
    first = inputs["attention_mask"].cumsum(1) <= 1
    inputs["labels"] = inputs["labels"].masked_fill(first, IGNORE)
    with attach(model, seek=SeekConfig(**budget)) as handle:
        loss = model(**inputs).loss
        found = loss.detach(), torch.autograd.grad(loss, list(model.parameters()))
        assert handle.seek.metrics.read()["seek/plain_share"] == 1
        assert "trained plainly" in handle.report() and "TokenSeek does not fit this data" in handle.report()
    assert_same(found, plain(tiny_llama(), inputs))
    for rows, mask in zip(handle.selection, inputs["attention_mask"], strict=True):
        real = mask.nonzero().flatten().tolist()
        assert rows.tolist() == real + [-1] * (N - len(real))


def test_embeddings_instead_of_ids(tiny_llama):
    model, inputs = tiny_llama(), make_inputs()
    from_ids = train(model, SeekConfig(), inputs)
    with attach(model, seek=SeekConfig()) as handle:
        embeddings = model.get_input_embeddings()(inputs.pop("input_ids"))
        loss = model(inputs_embeds=embeddings, **inputs).loss
        gradients = torch.autograd.grad(loss, list(model.parameters()))
    assert torch.equal(handle.selection, from_ids[2])
    assert_same((loss.detach(), gradients), from_ids)


@pytest.mark.parametrize("score", ["evidence", "paper"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(tiny_llama, reentrant, score):
    inputs, config = make_inputs(), SeekConfig(score=score, context=0.3)
    found = []
    for checkpointed in (False, True):
        model = tiny_llama()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with attach(model, seek=config) as handle:
            loss = model(**inputs).loss
            loss.backward()
        found.append((loss.detach(), [p.grad for p in model.parameters()], handle.selection))
    assert torch.equal(found[0][2], found[1][2])
    assert_same(*found)


@pytest.mark.parametrize("score", ["evidence", "paper", "gradient"])
def test_autocast(tiny_llama, score):
    """bfloat16 keeps 8 bits; the selection itself may differ where scores are close, so all rows are taken."""
    inputs = make_inputs()
    config = SeekConfig(score=score, context=1.0, plain_fallback=False)
    exact = train(tiny_llama(), config, inputs)
    model = tiny_llama()
    with attach(model, seek=config), torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs).loss
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.detach(), exact[0], rtol=2**-8, atol=0)
    for parameter, right in zip(model.parameters(), exact[1], strict=True):
        assert parameter.grad.dtype == torch.float32
        cosine = torch.cosine_similarity(parameter.grad.flatten(), right.flatten(), dim=0)
        # a few roundings of relative size 2^-8 per layer, each independent of the gradient
        assert cosine > 1 - (16 * 2**-8) ** 2 / 2


@pytest.mark.parametrize("score", ["evidence", "paper"])
def test_attention_dropout_is_off_in_both_passes(tiny_llama, score):
    model, inputs, config = tiny_llama(), make_inputs(), SeekConfig(score=score)
    truth = train(model, config, inputs)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.9
    assert_same(train(model, config, inputs), truth)


@pytest.mark.parametrize("score", ["evidence", "paper"])
def test_an_adapter_gets_the_gradient_and_the_base_none(tiny_llama, score):
    peft = pytest.importorskip("peft")
    inputs, config = make_inputs(), SeekConfig(score=score, context=1.0, plain_fallback=False)
    found = []
    for attached in (False, True):
        torch.manual_seed(0)
        model = peft.get_peft_model(
            tiny_llama(), peft.LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear")
        )
        if attached:
            with attach(model, seek=config) as handle:
                loss = model(**inputs).loss
                assert handle.selection is not None
        else:
            loss = model(**inputs).loss
        loss.backward()
        assert all((p.grad is not None) == ("lora" in name) for name, p in model.named_parameters())
        found.append((loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]))
    assert_same(found[1], found[0])
