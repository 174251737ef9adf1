"""The predictor learns the paper's choice, loses units that do nothing, keeps learning, and is told what it is for."""

import pytest
import torch

from hf_tokenseek import attach
from hf_tokenseek.lemo.blocks import Blocks, Layout
from hf_tokenseek.lemo.predictor import Predictor, PredictorShape, Tower, copy_predictor
from hf_tokenseek.lemo.predictor_training import Example, ZeroCounter, agreement, ranking_loss, recall, train_step
from hf_tokenseek.lemo.recording import recording
from hf_tokenseek.seek.batch import IGNORE
from tests.lemo.tiny_lemo import BLOCK, make_inputs
from tests.lemo.tiny_lemo import lemo as tiny_lemo
from tests.tiny_training import arguments, trainer

LAYERS, WIDTH = 3, 32


def lemo(**fields):
    """With the queries that are the default."""
    return tiny_lemo(**{"queries": "labelled", **fields})


def shape(layers: int = LAYERS, width: int = WIDTH, hidden=(16, 24), **targets):
    targets = {"block": BLOCK, "queries": "labelled", "rope": False, **targets}
    return PredictorShape(layers, width, [list(hidden)] * (2 * layers), 8, **targets)


def fresh(seed: int = 0, **fields) -> Predictor:
    torch.manual_seed(seed)
    return Predictor(shape(**fields))


def example(model, queries: str = "labelled", n: int = 82, seed: int = 0) -> Example:
    inputs = make_inputs("right", n=n, seed=seed)
    inputs["input_ids"] %= 128
    with recording(model):
        return Example(model, inputs, lemo(queries=queries))


def fit(predictor: Predictor, own: Example, steps: int = 400) -> list[float]:
    """Trains until there is nothing left to learn."""
    optimizer = torch.optim.Adam(predictor.parameters())
    losses = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / steps)
        losses.append(train_step(predictor, optimizer, own))
    return losses


@pytest.mark.parametrize("queries", ["all", "later"])
def test_trained_on_a_batch_it_makes_the_papers_choice(tiny_llama, queries):
    """Identity 13."""
    own, predictor = example(tiny_llama(), queries, n=42), fresh(hidden=(64, 64), queries=queries)
    losses = fit(predictor, own)
    assert losses[-1] < 1e-6 and losses[-1] < losses[0] / 1000
    assert recall(predictor, own, 0.4) == [1.0] * LAYERS
    # they are logarithms of shares
    for layer, targets in enumerate(own.targets):
        scores = predictor.scores(layer, own.means[layer], own.blocks).masked_fill(~own.blocks.exists, -torch.inf)
        torch.testing.assert_close(scores.softmax(1), targets / targets.sum(1, keepdim=True), rtol=0.1, atol=1e-3)


def test_recall_of_blind_choices_is_the_kept_share(tiny_llama):
    """Identity 13: the floor of all recalls. Mean of 300 draws of 8 of 20 blocks, within five standard errors."""
    own = example(tiny_llama(), n=80)
    own.blocks.counts, draws = [20, 20], 300
    own.targets = [torch.rand(2, 20)]
    generator = torch.Generator().manual_seed(0)
    found = torch.tensor(
        [agreement([torch.rand(2, 20, generator=generator)], own, 0.4)[0] for _ in range(draws)], dtype=torch.float64
    )
    assert abs(found.mean().item() - 0.4) < 5 * found.std().item() / draws**0.5
    assert agreement(own.targets, own, 0.4) == [1.0]
    assert agreement([-own.targets[0]], own, 0.4) == [0.0]


def test_the_loss_is_a_divergence():
    generator = torch.Generator().manual_seed(0)
    targets = torch.rand(2, 6, generator=generator)
    exists = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    wanted = targets.masked_fill(~exists, 0.0)
    wanted = wanted / wanted.sum(1, keepdim=True)
    scores = torch.randn(2, 6, generator=generator)
    expected = 0.0
    for row, count in ((0, 6), (1, 4)):
        said = scores[row, :count].softmax(0)
        expected += sum(p * (p / q).log() for p, q in zip(wanted[row, :count], said, strict=True)).item() / 2
    assert ranking_loss(scores, targets, exists).item() == pytest.approx(expected, rel=1e-5)
    assert ranking_loss(wanted.log() + 3, targets, exists).item() == pytest.approx(0.0, abs=1e-6)


def test_what_an_example_holds(tiny_llama):
    model = tiny_llama()
    own = example(model)
    assert [m.shape for m in own.means] == [(2, 20, WIDTH)] * LAYERS
    assert len(own.targets) == len(own.pooled) == LAYERS
    # the labels of the batch say who asks
    assert own.blocks.labelled.any()
    ids = make_inputs("right", n=82)["input_ids"] % 128
    embedded = model.model.embed_tokens(ids)
    torch.testing.assert_close(own.means[0][0, 0], embedded[0, :BLOCK].mean(0))


def whole_numbers(tower: Tower) -> None:
    """Sums of small whole numbers have no rounding, whatever their order."""
    generator = torch.Generator().manual_seed(0)
    for parameter in tower.parameters():
        parameter.data = torch.randint(-3, 4, parameter.shape, generator=generator).float()


def test_a_unit_that_is_never_positive_can_go():
    """Identity 14."""
    tower = Tower(6, 5, 7, 4)
    whole_numbers(tower)
    inputs = torch.randint(-4, 5, (3, 9, 6), generator=torch.Generator().manual_seed(1)).float()
    tower[0].bias.data[1] = tower[2].bias.data[4] = -1e6
    before = tower(inputs)
    tower.remove_units(0, torch.tensor([0, 2, 3, 4]))
    tower.remove_units(1, torch.tensor([0, 1, 2, 3, 5, 6]))
    assert torch.equal(tower(inputs), before)
    assert (tower[0].out_features, tower[2].in_features, tower[2].out_features, tower[4].in_features) == (4, 4, 6, 6)
    assert sum(p.numel() for p in tower.parameters()) == 6 * 4 + 4 + 4 * 6 + 6 + 6 * 4 + 4


def test_pruning_removes_dead_units_and_the_rest_goes_on_learning(tiny_llama):
    """Identity 14: the optimizer's parameters are the module's, with their part of its state."""
    own, predictor = example(tiny_llama()), fresh()
    optimizer = torch.optim.Adam(predictor.parameters(), lr=1e-2)
    counter = ZeroCounter(predictor)
    dead = predictor.towers[1][0]
    dead[0].bias.data[[2, 5]] = dead[2].bias.data[[0]] = -1e6
    train_step(predictor, optimizer, own)
    before = [predictor.scores(layer, own.means[layer], own.blocks) for layer in range(LAYERS)]
    moments = optimizer.state[dead[2].weight]["exp_avg"]
    zeros = dead[0](torch.randn(1, WIDTH)).relu()[0, [2, 5]]
    assert (zeros == 0).all()

    removed = counter.prune(optimizer, 1.0)
    shapes = predictor.current_shape().hidden
    assert removed == sum(16 + 24 - sum(pair) for pair in shapes) >= 3
    assert shapes[2][0] <= 14 and shapes[2][1] <= 23
    count = sum(WIDTH * a + a + a * b + b + b * 8 + 8 for a, b in shapes)
    assert sum(p.numel() for p in predictor.parameters()) == count
    # in another order of sums
    for layer in range(LAYERS):
        torch.testing.assert_close(predictor.scores(layer, own.means[layer], own.blocks), before[layer])

    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(list(predictor.parameters()))
    assert all(a is b for a, b in zip(held, predictor.parameters(), strict=True))
    assert set(optimizer.state) == set(held)
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in held)
    kept = optimizer.state[dead[2].weight]["exp_avg"]
    assert kept.shape != moments.shape and set(kept.flatten().tolist()) <= set(moments.flatten().tolist())
    weights = [p.detach().clone() for p in predictor.parameters()]
    losses = [train_step(predictor, optimizer, own) for _ in range(30)]
    assert losses[-1] < losses[0]
    moved = [not torch.equal(a, b) for a, b in zip(weights, predictor.parameters(), strict=True)]
    assert sum(moved) > 0.9 * len(moved)
    counter.close()
    assert counter.prune(optimizer, 0.5) > 0
    train_step(predictor, optimizer, own)
    # nothing has been counted since
    assert counter.prune(optimizer, 0.01) == 0


def test_a_state_always_keeps_a_unit():
    predictor = fresh(layers=1)
    optimizer, counter = torch.optim.SGD(predictor.parameters(), lr=0.1), ZeroCounter(predictor)
    for pair in predictor.towers:
        for tower in pair:
            tower[0].bias.data.fill_(-1e6)
            tower(torch.ones(1, WIDTH))
    counter.prune(optimizer, 0.5)
    assert all(first == 1 for first, _ in predictor.current_shape().hidden)


def test_only_training_is_counted(tiny_llama):
    own, predictor = example(tiny_llama()), fresh()
    counter = ZeroCounter(predictor)
    recall(predictor, own, 0.4)
    assert counter.state_dict()["seen"] == [0] * (4 * LAYERS)
    predictor.scores(1, own.means[1], own.blocks)
    assert counter.state_dict()["seen"] == [0] * 4 + [40] * 4 + [0] * 4
    zeros = (predictor.towers[1][0][0](normed(own.means[1])) <= 0).flatten(0, 1).sum(0)
    assert torch.equal(counter.state_dict()["zeros"][4], zeros.float())


def normed(means):
    return means * torch.rsqrt(means.square().mean(-1, keepdim=True) + 1e-6)


def test_longer_sequences_do_not_make_shares_more_extreme():
    """The same blocks twice over are looked at twice as often, and each has half of its share."""
    predictor = fresh(layers=1, queries="all")
    means = torch.randn(1, 5, WIDTH, generator=torch.Generator().manual_seed(0))

    def blocks(count: int) -> Blocks:
        n = count * BLOCK
        return Blocks(torch.zeros(1, n, dtype=torch.long), torch.full((1, n), IGNORE), [n], lemo(queries="all"))

    once, twice = predictor.scores(0, means, blocks(5)), predictor.scores(0, torch.cat([means] * 2, 1), blocks(10))
    torch.testing.assert_close(twice, torch.cat([once] * 2, 1))


def test_saving_and_loading(tiny_llama, tmp_path):
    model, predictor = tiny_llama(), fresh()
    own = example(model)
    optimizer, counter = torch.optim.Adam(predictor.parameters()), ZeroCounter(predictor)
    train_step(predictor, optimizer, own)
    # sizes that differ from network to network
    assert counter.prune(optimizer, 0.6) > 0
    predictor.save(tmp_path / "a")
    copy_predictor(tmp_path / "a", tmp_path / "b")
    copy_predictor(tmp_path / "b", tmp_path / "b")
    loaded = Predictor.load(tmp_path / "b", model, lemo())
    assert loaded.shape == predictor.current_shape()
    for layer in range(LAYERS):
        same = [p.scores(layer, own.means[layer], own.blocks) for p in (predictor, loaded)]
        assert torch.equal(*same)
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize(
    ("fields", "config", "said"),
    [
        (
            None,
            {},
            "has no lemo_predictor.safetensors and lemo_predictor.json. Train a predictor with recipes/train_p",
        ),
        ({"layers": 2}, {}, "with 2 layers of width 32, this one has 3 of 32. Train one for this model"),
        ({"width": 16}, {}, "with 3 layers of width 16, this one has 3 of 32"),
        ({}, {"block": 8}, "is for {'block': 4, .*LeMo is asked for {'block': 8, .*Set the same"),
        ({"queries": "all"}, {}, "'queries': 'all', .*LeMo is asked for .*'queries': 'labelled'"),
        ({"rope": True}, {}, "'rope': True.; LeMo is asked for .*'rope': False"),
    ],
)
def test_what_does_not_fit_is_refused(tiny_llama, tmp_path, fields, config, said):
    if fields is not None:
        fresh(**fields).save(tmp_path)
    model = tiny_llama()
    with pytest.raises(ValueError, match=said):
        attach(model, lemo=lemo(score="predictor", predictor=str(tmp_path), **config))
    # and nothing is left behind
    assert all("forward" not in vars(module) for module in model.modules())


@pytest.mark.parametrize("written", ["[]", '{"layers": 3}'])
def test_shapes_of_something_else_are_refused(tiny_llama, tmp_path, written):
    fresh().save(tmp_path)
    (tmp_path / "lemo_predictor.json").write_text(written)
    with pytest.raises(ValueError, match="lemo_predictor.json should have .*'block', .*Train the predictor anew"):
        attach(tiny_llama(), lemo=lemo(score="predictor", predictor=str(tmp_path)))


def test_it_goes_where_the_model_goes(tiny_llama, tmp_path):
    """Some trainers move the model when callbacks have attached already."""
    fresh().save(tmp_path)
    model = tiny_llama()
    with attach(model, lemo=lemo(score="predictor", predictor=str(tmp_path))) as handle:
        handle.lemo.begin(Layout(*(torch.zeros(1, 8, dtype=torch.long, device="meta") for _ in "ab"), [8], 0, True))
        assert {p.device.type for p in handle.lemo._predictor.parameters()} == {"meta"}


@pytest.mark.parametrize("thresholds", [None, [1.0] * LAYERS])
def test_a_model_trains_with_it(tiny_llama, tmp_path, thresholds):
    model = tiny_llama()
    own, predictor = example(model, n=42), fresh(hidden=(64, 64))
    fit(predictor, own)
    predictor.save(tmp_path)
    inputs = make_inputs("right", n=42)
    inputs["input_ids"] %= 128
    inputs["labels"] = inputs["labels"].where(inputs["labels"] < 0, inputs["input_ids"])
    fields = {"thresholds": thresholds, "bounds": [0.1, 0.9], "labelled": False}
    kept, means = {}, {}
    for name, folder in (("oracle", None), ("predictor", str(tmp_path))):
        with attach(model, lemo=lemo(score=name, predictor=folder, **fields)) as handle:
            loss = model(**inputs).loss
            loss.backward()
            elimination = handle.lemo.elimination
            kept[name] = [own.blocks for own in elimination.kept.values()]
            means[name] = elimination.blocks.in_means(elimination.scores)
        assert loss.isfinite() and model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
        model.zero_grad()
    # thresholds of one are thresholds of the other
    torch.testing.assert_close(means["predictor"], means["oracle"], rtol=0.1, atol=0.02)
    if thresholds is None:
        assert all(map(torch.equal, kept["oracle"], kept["predictor"]))


def test_a_trainer_saves_it_beside_the_model(tiny_llama, tmp_path):
    fresh().save(tmp_path / "predictor")
    config = lemo(score="predictor", predictor=str(tmp_path / "predictor"))
    args = arguments(tmp_path / "out", seek=None, lemo=config, save_strategy="steps", save_steps=2)
    own = trainer(tiny_llama(), args)
    own.train()
    own.save_model()
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-2"):
        loaded = Predictor.load(folder, tiny_llama(), lemo())
        assert all(map(torch.equal, loaded.state_dict().values(), fresh().state_dict().values()))
