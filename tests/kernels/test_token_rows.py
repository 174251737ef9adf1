import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.kernels.lean_checks import saved_bytes
from tokenseek_kernels import join_rows, split_rows
from tokenseek_kernels.token_rows.function import _gather_op, _write_op

BATCH, N, WIDTH = 4, 9, 5
# first and last, a gap, one row, none at all
ROWS = torch.tensor([[0, 1, 4, 8], [2, 3, 7, -1], [5, -1, -1, -1], [-1, -1, -1, -1]])
TAKEN = torch.zeros(BATCH, N, dtype=torch.bool)
TAKEN[[0, 0, 0, 0, 1, 1, 1, 2], [0, 1, 4, 8, 2, 3, 7, 5]] = True
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
IMPLEMENTATIONS = ["torch", "reference"]


def draw(dtype=torch.float64, shape=(BATCH, N, WIDTH), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def ragged(batch, n):
    """Any ascending rows of `batch` sequences, filled up with -1."""

    def filled(picked):
        slots = max(map(len, picked))
        return torch.tensor([sorted(own) + [-1] * (slots - len(own)) for own in picked]).long().view(batch, slots)

    own = st.sets(st.integers(0, n - 1))
    return st.lists(own, min_size=batch, max_size=batch).map(filled)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moves_the_rows_and_nothing_else(dtype, impl):
    states, fresh = draw(dtype), draw(dtype, (BATCH, 4, WIDTH), seed=1)
    before = states.clone()
    rest, kept = split_rows(states, ROWS, impl)
    assert rest.data_ptr() == states.data_ptr() and rest.shape == states.shape
    joined = join_rows(rest, fresh, ROWS, impl=impl)
    assert kept.dtype == joined.dtype == dtype
    for b, own in enumerate(ROWS.tolist()):
        expected = before[b].clone()
        for slot, row in enumerate(own):
            assert torch.equal(kept[b, slot], before[b, row] if row >= 0 else torch.zeros(WIDTH, dtype=dtype))
            if row >= 0:
                expected[row] = fresh[b, slot]
        assert torch.equal(joined[b], expected)
    assert torch.equal(states, before)


def layer(kept, weight):
    return kept + torch.tanh(kept @ weight)


def pair(states, weight, rows=ROWS, inplace=False, impl="auto"):
    rest, kept = split_rows(states, rows, impl)
    return join_rows(rest, layer(kept, weight), rows, inplace, impl)


UPSTREAM = {
    "dense": lambda grad: grad,
    "expanded": lambda grad: grad[:1, :1].expand_as(grad),
    "transposed": lambda grad: grad.transpose(0, 1).contiguous().transpose(0, 1),
}


@pytest.mark.parametrize("upstream", UPSTREAM)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_gradients_pass_by_the_layer_and_through_it(dtype, inplace, upstream):
    states, weight = draw(dtype).requires_grad_(), draw(dtype, (WIDTH, WIDTH), seed=1).requires_grad_()
    upstream = UPSTREAM[upstream](draw(dtype, seed=2))
    before = upstream.clone()
    # a copy, as in place would change the numbers that the truth below is computed from
    grads = torch.autograd.grad(pair(states.clone(), weight, inplace=inplace), (states, weight), upstream)
    assert torch.equal(grads[0][~TAKEN], upstream[~TAKEN])
    assert torch.equal(upstream, before)
    # the layer alone, on the same numbers in the same order
    kept = torch.zeros(BATCH, 4, WIDTH, dtype=dtype)
    kept[ROWS >= 0] = states.detach()[TAKEN]
    kept.requires_grad_()
    through = torch.zeros_like(kept)
    through[ROWS >= 0] = upstream[TAKEN]
    truth = torch.autograd.grad(layer(kept, weight), (kept, weight), through)
    assert torch.equal(grads[0][TAKEN], truth[0][ROWS >= 0])
    assert torch.equal(grads[1], truth[1])


@settings(deadline=None)
@given(rows=ragged(2, 5))
def test_equals_the_reference_with_all_gradients(rows):
    states, weight, upstream = draw(shape=(2, 5, 3)), draw(shape=(3, 3), seed=1), draw(shape=(2, 5, 3), seed=2)
    states.requires_grad_(), weight.requires_grad_()
    mine, theirs = (pair(states, weight, rows, impl=impl) for impl in IMPLEMENTATIONS)
    assert torch.equal(mine, theirs)
    found, expected = (
        torch.autograd.grad(y, (states, weight), upstream, materialize_grads=True) for y in (mine, theirs)
    )
    torch.testing.assert_close(found, expected)


@settings(deadline=None)
@given(rows=ragged(2, 5))
def test_what_is_put_back_unchanged_changes_nothing(rows):
    states = draw(shape=(2, 5, 3))
    rest, kept = split_rows(states, rows)
    assert torch.equal(join_rows(rest, kept, rows), states)


@settings(deadline=None)
@given(rows=ragged(2, 5))
def test_reading_and_writing_are_adjoint(rows):
    states, fresh = draw(shape=(2, 5, 3)), draw(shape=(*rows.shape, 3), seed=1)
    nothing, _ = split_rows(torch.zeros_like(states), rows)
    written, (_, read) = join_rows(nothing, fresh, rows), split_rows(states, rows)
    torch.testing.assert_close((written * states).sum(), (fresh * read).sum())


@pytest.mark.parametrize("k", range(N + 1))
def test_any_number_of_rows(k):
    states, weight = draw().requires_grad_(), draw(shape=(WIDTH, WIDTH), seed=1).requires_grad_()
    rows = torch.stack([draw(shape=(N,), seed=seed).argsort()[:k].sort().values for seed in range(BATCH)])
    assert torch.autograd.gradcheck(lambda x, w: pair(x, w, rows), (states, weight))


@pytest.mark.parametrize("inplace", [False, True])
def test_gradcheck_of_layers_that_take_different_rows(inplace):
    """A row that one layer leaves out is in the next one what the residual stream says."""
    states, weight = draw().requires_grad_(), draw(shape=(WIDTH, WIDTH), seed=1).requires_grad_()
    second = torch.tensor([[1, 2, 3], [0, 7, 8], [4, 5, 6], [2, -1, -1]])

    def layers(states, weight):
        return pair(pair(states.clone(), weight, ROWS, inplace), weight, second, inplace)

    assert torch.autograd.gradcheck(layers, (states, weight))


def test_only_one_of_them_has_a_gradient():
    states, upstream = draw().requires_grad_(), draw(seed=2)
    rest, kept = split_rows(states, ROWS)
    (grad,) = torch.autograd.grad(kept, states, through := draw(shape=kept.shape, seed=1))
    assert torch.equal(grad[TAKEN], through[ROWS >= 0]) and not grad[~TAKEN].any()
    # what stands in the rows does not depend on the states
    rest, kept = split_rows(states, ROWS)
    (grad,) = torch.autograd.grad(join_rows(rest, kept.detach(), ROWS), states, upstream)
    assert torch.equal(grad[~TAKEN], upstream[~TAKEN]) and not grad[TAKEN].any()


def test_a_stream_without_a_gradient_gets_one_from_the_layer():
    states, weight = draw(), draw(shape=(WIDTH, WIDTH), seed=1).requires_grad_()
    upstream = draw(seed=2)
    truth = torch.autograd.grad(pair(states, weight, impl="reference"), weight, upstream)
    for inplace in (False, True):
        torch.testing.assert_close(
            torch.autograd.grad(pair(states.clone(), weight, ROWS, inplace), weight, upstream), truth
        )


@pytest.mark.parametrize("grad", [False, True])
def test_in_place_is_the_memory_of_the_states(grad):
    states = draw().requires_grad_(grad).clone()
    rest, kept = split_rows(states, ROWS)
    joined = join_rows(rest, 2 * kept, ROWS, inplace=True)
    assert joined is rest and joined.data_ptr() == states.data_ptr()
    assert torch.equal(states[TAKEN], joined[TAKEN])
    other = split_rows(states, ROWS)[0]
    assert join_rows(other, kept, ROWS).data_ptr() != states.data_ptr()


def test_in_place_over_what_was_saved_is_noticed():
    states = draw().requires_grad_()
    stream = states.clone()
    saved = stream.square()
    rest, kept = split_rows(stream, ROWS)
    joined = join_rows(rest, kept, ROWS, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (joined + saved).sum().backward()


@pytest.mark.parametrize("inplace", [False, True])
def test_saves_the_rows_alone(inplace):
    states = draw().requires_grad_()

    def moved():
        rest, kept = split_rows(states.clone(), ROWS)
        return join_rows(rest, kept, ROWS, inplace)

    assert saved_bytes(moved) == ROWS.numel() * 8


def test_without_gradients_nothing_is_saved():
    saved = []
    states = draw().requires_grad_()
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        rest, kept = split_rows(states, ROWS)
        joined = join_rows(rest, kept, ROWS)
    assert not saved and not joined.requires_grad


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_empty_slots_are_neither_read_nor_written(impl):
    """NaN in every row that is left out, and in every slot without a row."""
    states = draw().masked_fill(~TAKEN[..., None], float("nan")).requires_grad_()
    rest, kept = split_rows(states, ROWS, impl)
    assert not kept.isnan().any()
    fresh = kept.masked_fill((ROWS < 0)[..., None], float("nan"))
    joined = join_rows(rest, fresh, ROWS, impl=impl)
    assert torch.equal(joined.isnan().all(-1), ~TAKEN) and torch.equal(joined.isnan().any(-1), ~TAKEN)
    (grad,) = torch.autograd.grad(joined, states, torch.ones_like(joined))
    assert torch.equal(grad, torch.ones_like(grad))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_any_strides(impl):
    states = draw(shape=(N, WIDTH, BATCH)).permute(2, 0, 1)
    fresh = draw(shape=(1, 1, WIDTH), seed=1).expand(BATCH, 4, WIDTH)
    rest, kept = split_rows(states, ROWS, impl)
    assert torch.equal(kept, split_rows(states.contiguous(), ROWS, impl)[1])
    expected = join_rows(states.contiguous(), fresh.contiguous(), ROWS, impl=impl)
    assert torch.equal(join_rows(rest, fresh, ROWS, impl=impl), expected)


def test_is_differentiable_once():
    states = draw().requires_grad_()
    (grad,) = torch.autograd.grad(split_rows(states, ROWS)[1].square().sum(), states, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_fake_tensors_and_opcheck():
    states, fresh = draw(torch.float32), draw(torch.float32, (BATCH, 4, WIDTH))
    torch.library.opcheck(_gather_op.operator, (states, ROWS, "torch"))
    torch.library.opcheck(_write_op.operator, (states, fresh, ROWS, "torch"))
    with FakeTensorMode() as mode:
        # what looks into operators to count their bytes runs their functions as well
        assert _gather_op.function(mode.from_tensor(states), mode.from_tensor(ROWS), "torch").shape == (
            BATCH,
            4,
            WIDTH,
        )
        _write_op.function(*map(mode.from_tensor, (states, fresh, ROWS)), "torch")
        states = torch.empty(2, 7, 3, requires_grad=True)
        rest, kept = split_rows(states, torch.zeros(2, 4, dtype=torch.long))
        assert kept.shape == (2, 4, 3)
        joined = join_rows(rest, kept, torch.zeros(2, 4, dtype=torch.long), inplace=True)
        joined.sum().backward()
        assert states.grad.shape == joined.shape == (2, 7, 3)


def test_a_rest_that_was_not_split_off_is_refused():
    states = draw().requires_grad_()
    rest, kept = split_rows(states, ROWS)
    for other in (states, rest * 1, split_rows(states, ROWS, "reference")[0]):
        with pytest.raises(
            ValueError, match="`rest` must come from split_rows, which completes its gradient, got one"
        ):
            join_rows(other, kept, ROWS)


@pytest.mark.parametrize(
    ("states", "rows", "message"),
    [
        (
            draw()[0],
            ROWS,
            r"`states` must be floating point of shape \(batch, n, width\), got torch.float64 of shape \(9, 5\)",
        ),
        (draw().long(), ROWS, "`states` must be floating point .*, got torch.int64"),
        (draw(), ROWS[1:], r"`rows` must be torch.int64 of shape \(4, k\), .* got torch.int64 of shape \(3, 4\)"),
        (draw(), ROWS.int(), "`rows` must be torch.int64 .* got torch.int32"),
    ],
)
def test_what_does_not_fit_is_refused(states, rows, message):
    with pytest.raises(ValueError, match=message):
        split_rows(states, rows)
    with pytest.raises(ValueError, match=message.replace("`states`", "`rest`")):
        join_rows(states, draw(), rows)


@pytest.mark.parametrize("fresh", [draw(shape=(BATCH, 3, WIDTH)), draw(torch.float32, (BATCH, 4, WIDTH))])
def test_rows_that_do_not_fit_are_refused(fresh):
    with pytest.raises(ValueError, match=r"`fresh` must be torch.float64 of shape \(4, 4, 5\), .* Cast it"):
        join_rows(draw(), fresh, ROWS)


def test_unknown_impl_is_refused():
    with pytest.raises(ValueError, match=r"impl.*\['triton', 'torch', 'reference'\].*'fast'"):
        split_rows(draw(), ROWS, impl="fast")
    with pytest.raises(ValueError, match=r"impl.*\['triton', 'torch', 'reference'\].*'fast'"):
        join_rows(draw(), draw(shape=(BATCH, 4, WIDTH)), ROWS, impl="fast")
