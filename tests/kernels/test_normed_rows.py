"""`split_normed_rows`: as the rows, then their norm, and as both written out in float64."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.kernels.lean_checks import CONVENTIONS, assert_as_good_as, cast, saved_bytes
from tests.kernels.test_token_rows import BATCH, DTYPES, IMPLEMENTATIONS, ROWS, TAKEN, N
from tokenseek_kernels import join_rows, rms_norm, split_normed_rows, split_rows

WIDTH, EPS = 6, 1e-5


def draw(dtype=torch.float64, shape=(BATCH, N, WIDTH), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def fused(states, rows, weight, impl="torch", **rule):
    return split_normed_rows(states, rows, weight, EPS, impl=impl, **rule)


def one_by_one(states, rows, weight, impl="torch", **rule):
    rest, kept = split_rows(states, rows, impl)
    return rest, kept, rms_norm(kept, weight, EPS, impl=impl, **rule)


def layer(split, states, weight, rows=ROWS, **rule):
    """Something of the normed rows on top of the rows, as a decoder layer has it."""
    rest, kept, normed = split(states, rows, weight, **rule)
    fresh = kept + torch.tanh(normed).to(kept.dtype)
    return join_rows(rest, fresh, rows, impl=rule.get("impl", "torch"))


def results(split, tensors, upstream, rows=ROWS, **rule):
    """Output and gradients of the stream and of the weight."""
    states, weight = tensors
    output = layer(split, states, weight, rows, **rule)
    leaves = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream.to(output.dtype))]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", CONVENTIONS.values(), ids=CONVENTIONS)
def test_is_the_rows_and_then_their_norm(rule, dtype, impl):
    tensors = [draw(dtype).requires_grad_(), draw(dtype, (WIDTH,), 1).requires_grad_()]
    for mine, theirs in zip(
        fused(tensors[0], ROWS, tensors[1], impl, **rule),
        one_by_one(tensors[0], ROWS, tensors[1], impl, **rule),
        strict=True,
    ):
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)
    upstream, rule = draw(seed=2), {**rule, "impl": impl}
    wide = cast(tensors, torch.float64)
    found, plain = (results(split, tensors, upstream, **rule) for split in (fused, one_by_one))
    assert_as_good_as(found, plain, results(one_by_one, wide, upstream, **rule))


@pytest.mark.parametrize("frozen", ["weight", "states", "no weight"])
def test_gradients_that_nobody_asks_for(frozen):
    states, weight = draw().requires_grad_(frozen != "states"), draw(shape=(WIDTH,), seed=1)
    weight = None if frozen == "no weight" else weight.requires_grad_(frozen != "weight")
    found, expected = (results(split, (states, weight), draw(seed=2)) for split in (fused, one_by_one))
    assert len(found) == 2
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("k", range(N + 1))
def test_gradcheck_with_any_number_of_rows(k):
    states, weight = draw().requires_grad_(), draw(shape=(WIDTH,), seed=1).requires_grad_()
    rows = torch.stack([draw(shape=(N,), seed=seed).argsort()[:k].sort().values for seed in range(BATCH)])
    assert torch.autograd.gradcheck(lambda x, w: layer(fused, x, w, rows), (states, weight))


def test_gradcheck_of_layers_that_take_different_rows():
    states, weight = draw().requires_grad_(), draw(shape=(WIDTH,), seed=1).requires_grad_()
    second = torch.tensor([[1, 2, 3], [0, 7, 8], [4, 5, 6], [2, -1, -1]])

    def layers(states, weight):
        return layer(fused, layer(fused, states, weight), weight, second)

    assert torch.autograd.gradcheck(layers, (states, weight))


def test_only_one_of_the_outputs_has_a_gradient():
    states, weight = draw().requires_grad_(), draw(shape=(WIDTH,), seed=1).requires_grad_()
    for own in (1, 2):
        upstream = draw(shape=(BATCH, 4, WIDTH), seed=3)
        found, expected = (
            torch.autograd.grad(split(states, ROWS, weight)[own], (states, weight), upstream, materialize_grads=True)
            for split in (fused, one_by_one)
        )
        torch.testing.assert_close(found, expected)
        assert not found[0][~TAKEN].any()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_empty_slots_and_other_rows_are_not_read(impl):
    """NaN in every row that is left out."""
    states = draw().masked_fill(~TAKEN[..., None], float("nan")).requires_grad_()
    weight = draw(shape=(WIDTH,), seed=1).requires_grad_()
    _, kept, normed = fused(states, ROWS, weight, impl)
    assert not kept[ROWS < 0].any() and not normed[ROWS < 0].any()
    output, *gradients = results(fused, (states, weight), torch.ones(BATCH, N, WIDTH), impl=impl)
    assert torch.equal(output.isnan().all(-1), ~TAKEN) and torch.equal(output.isnan().any(-1), ~TAKEN)
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saves_the_rows_once(dtype):
    """A row and 4 bytes, and 8 bytes of its index: what it hands out is what it keeps."""
    states, weight = draw(dtype).requires_grad_(), draw(dtype, (WIDTH,), 1)
    own = ROWS.numel() * (WIDTH * dtype.itemsize + 4 + 8)

    def run():
        return fused(states, ROWS, weight)[2]

    assert saved_bytes(run, weight) == own
    assert saved_bytes(lambda: layer(fused, states, weight), weight) == own + ROWS.numel() * WIDTH * dtype.itemsize


def test_under_autocast_it_computes_as_it_does_outside():
    tensors = draw(torch.float32).requires_grad_(), draw(torch.float32, (WIDTH,), 1).requires_grad_()
    plain = results(fused, tensors, draw(seed=2))
    with torch.autocast("cpu", torch.bfloat16):
        found = results(fused, tensors, draw(seed=2))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, plain, strict=True))


def test_is_differentiable_once():
    states, weight = draw().requires_grad_(), draw(shape=(WIDTH,), seed=1)
    (grad,) = torch.autograd.grad(fused(states, ROWS, weight)[2].square().sum(), states, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_fake_tensors():
    with FakeTensorMode():
        states, weight = torch.empty(2, 7, 3, requires_grad=True), torch.empty(3, requires_grad=True)
        rows = torch.zeros(2, 4, dtype=torch.long)
        output = layer(fused, states, weight, rows)
        output.sum().backward()
        assert states.grad.shape == output.shape == (2, 7, 3) and weight.grad.shape == (3,)


@pytest.mark.parametrize(
    ("states", "rows", "weight", "message"),
    [
        (draw()[0], ROWS, None, r"`states` must be floating point of shape \(batch, n, width\)"),
        (draw(), ROWS.int(), None, "`rows` must be torch.int64 .* got torch.int32"),
        (draw(), ROWS, torch.ones(5), r"`weight` must be floating point of shape \[6\]"),
    ],
)
def test_what_does_not_fit_is_refused(states, rows, weight, message):
    with pytest.raises(ValueError, match=message):
        split_normed_rows(states, rows, weight, EPS)


def test_unknown_impl_is_refused():
    with pytest.raises(ValueError, match=r"impl.*\['triton', 'torch', 'reference'\].*'fast'"):
        fused(draw(), ROWS, None, impl="fast")
