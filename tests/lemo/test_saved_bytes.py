"""What is saved for backward follows the kept rows: of a dropped token there is nothing (identity 17)."""

from functools import cache

import pytest
import torch

from hf_tokenseek import attach
from hf_tokenseek.memory import SavedActivations
from tests.ist.tiny_ist import layers_of
from tests.lemo.deep_lemo import LAYERS, batch, llama, windowed
from tests.lemo.tiny_lemo import BLOCK, lemo

ROWS, LENGTHS, KEEPS = 2, (40, 80, 200), (0.2, 0.5, 0.8)
FLOAT, HEAD, KV_HEADS, WIDTH = 8, 8, 2, 32
# of a kept row its number, and its sines and cosines; layers that keep the same rows share them
ROW = 8 + 2 * HEAD * FLOAT


def saved(model, n: int, **fields) -> int:
    with attach(model, lemo=lemo(**{"keep": 1.0, **fields})), SavedActivations(model) as counted:
        loss = model(**batch(n=n, batch=ROWS)).loss
    assert loss.requires_grad
    return counted.bytes


@cache
def of_a_token() -> int:
    """What a plain layer saves of a token, without sines and cosines, which layers share."""
    more, remainder = divmod(saved(llama(layers=2), 40) - saved(llama(layers=1), 40), ROWS * 40)
    assert more > 0 and remainder == 0
    return more


def of_the_mlp() -> int:
    """The share of its second half."""
    layer = layers_of(llama())[0]
    states = torch.randn(ROWS, 40, WIDTH, dtype=torch.float64, requires_grad=True)
    with SavedActivations(layer) as counted:
        output = layer.mlp(layer.post_attention_layernorm(states))
    assert output.requires_grad
    return counted.bytes // (ROWS * 40)


def counts(n: int, keep: float) -> tuple[int, int]:
    """Kept and dropped rows of all layers together."""
    kept = int(keep * n / BLOCK + 1e-9) * BLOCK
    return LAYERS * ROWS * kept, LAYERS * ROWS * (n - kept)


def expected(n: int, keep: float, choices: int = 1) -> int:
    kept, dropped = counts(n, keep)
    shared = 2 * n * HEAD * FLOAT
    return saved(llama(), n) - shared - dropped * of_a_token() + choices * kept // LAYERS * ROW


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("keep", KEEPS)
def test_a_dropped_token_saves_nothing(n, keep):
    assert saved(llama(), n, keep=keep) == expected(n, keep)


def test_a_dropped_token_saves_nothing_beside_a_window_either():
    """As many kept tokens of twice as many: what more is saved is the embedding's and the head's, as it is without."""

    def of_dropped(build):
        found = []
        for n, keep in ((80, 0.8), (160, 0.4)):
            with attach(model := build(), lemo=lemo(keep=keep)), SavedActivations(model) as counted:
                loss = model(**batch(n=n, batch=ROWS)).loss
            assert loss.requires_grad
            found.append(counted.bytes)
        return found[1] - found[0]

    assert of_dropped(windowed) == of_dropped(llama)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("keep", KEEPS)
def test_a_detached_token_saves_its_keys_and_values(n, keep):
    more = counts(n, keep)[1] * 2 * KV_HEADS * HEAD * FLOAT
    assert saved(llama(), n, keep=keep, mode="detach") == expected(n, keep) + more


@pytest.mark.parametrize("keep", KEEPS)
def test_a_dense_mlp_saves_of_all_tokens(keep):
    more = counts(80, keep)[1] * of_the_mlp()
    assert saved(llama(), 80, keep=keep, mlp="dense") == expected(80, keep) + more


@pytest.mark.parametrize("score", ["pooled", "oracle", "random", "recency"])
@pytest.mark.parametrize("rescore", [0, 1])
def test_scoring_leaves_nothing_behind(score, rescore):
    fields = {"score": score, "rescore": rescore, "probe_steps": 1}
    assert saved(llama(), 80, keep=0.5, **fields) == expected(80, 0.5, choices=LAYERS if rescore else 1)


def test_backward_lets_everything_go_but_the_choice():
    model = llama()
    with attach(model, lemo=lemo()) as handle:
        with SavedActivations(model) as counted:
            loss = model(**batch(n=80)).loss
        loss.backward()
        del loss
        choice, *others = handle.lemo.elimination.kept.values()
    assert all(other is choice for other in others)
    assert counted.bytes == choice.rows.nbytes
