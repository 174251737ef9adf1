"""The Triton kernels of `split_rows` and `join_rows`: what they move is equal to the bit."""

import importlib

import pytest
import torch

from tokenseek_kernels import join_rows, split_rows
from tokenseek_kernels.token_rows.function import _gather_op, _write_op

triton_module = importlib.import_module("tokenseek_kernels.token_rows.triton")

N = 50
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def ragged(n=N):
    """More rows than a program has, one fewer, the last one, none."""
    rows = torch.full((4, n - 3), -1)
    rows[0] = torch.cat([torch.arange(n // 2), torch.arange(n // 2 + 2, n - 1)])
    rows[1, :-1] = torch.arange(1, n - 3)
    rows[2, 0] = n - 1
    return rows


def draw(device, dtype, shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def results(states, weight, rows, upstream, impl, inplace=False):
    """Output, and gradients of the stream and of a layer's weight."""
    rest, kept = split_rows(states.clone(), rows, impl)
    joined = join_rows(rest, kept + kept * weight, rows, inplace, impl)
    return joined.detach(), kept.detach(), *torch.autograd.grad(joined, (states, weight), upstream)


@pytest.mark.parametrize(
    ("dtype", "width", "inplace"),
    [
        *((torch.float32, width, width > 128) for width in (1, 7, 128, 200, 1024, 1100)),
        *((dtype, 1100, inplace) for dtype in DTYPES for inplace in (False, True) if dtype != torch.float32),
    ],
    ids=str,
)
def test_equals_torch(device, dtype, width, inplace):
    # programs hold fewer of the wide rows
    n = N if width < 1024 else 10
    rows = ragged(n).to(device)
    states, upstream = (draw(device, dtype, (4, n, width), seed) for seed in range(2))
    weight = draw(device, dtype, (width,), 2)
    tensors = (states.requires_grad_(), weight.requires_grad_(), rows, upstream)
    for mine, theirs in zip(results(*tensors, "triton", inplace), results(*tensors, "torch"), strict=True):
        assert mine.dtype == dtype and torch.equal(mine, theirs)


def test_equals_the_reference(device):
    rows = ragged(9).to(device)
    states, upstream = (draw(device, torch.float64, (4, 9, 5), seed) for seed in range(2))
    weight = draw(device, torch.float64, (5,), 2)
    tensors = (states.requires_grad_(), weight.requires_grad_(), rows, upstream)
    torch.testing.assert_close(results(*tensors, "triton"), results(*tensors, "reference"))


def test_gradcheck(device):
    rows = torch.tensor([[0, 2], [1, -1]], device=device)
    states = draw(device, torch.float64, (2, 3, 2)).requires_grad_()

    def layer(states):
        rest, kept = split_rows(states, rows, "triton")
        return join_rows(rest, kept.sin(), rows, impl="triton")

    assert torch.autograd.gradcheck(layer, (states,))


@pytest.mark.parametrize("k", [0, 1, N])
def test_none_one_and_all(device, k):
    rows = torch.arange(k, device=device).expand(2, k)
    states, fresh = draw(device, torch.float32, (2, N, 7)), draw(device, torch.float32, (2, k, 7), 1)
    rest, kept = split_rows(states, rows, "triton")
    assert torch.equal(kept, states[:, :k])
    assert torch.equal(join_rows(rest, fresh, rows, impl="triton"), torch.cat([fresh, states[:, k:]], 1))


def inside_nan(states):
    """The same numbers, every other of them in a wider matrix of NaN."""
    batch, rows, width = states.shape
    wide = states.new_full((batch + 1, rows + 2, 2 * width + 3), float("nan"))
    return wide[1:, 1:-1, 2:-1:2].copy_(states)


def test_nothing_outside_of_the_rows_is_touched(device):
    """NaN around the tensors, in the rows that are left out and in the slots without one."""
    rows = ragged().to(device)
    states, fresh = draw(device, torch.float32, (4, N, 7)), draw(device, torch.float32, (4, N - 3, 7), 1)
    taken = torch.zeros(4, N + 1, dtype=torch.bool, device=device).scatter_(1, rows % (N + 1), True)[:, :N]
    states = inside_nan(states.masked_fill_(~taken[..., None], float("nan")))
    fresh = inside_nan(fresh.masked_fill_((rows < 0)[..., None], float("nan")))
    rest, kept = split_rows(states, rows, "triton")
    assert torch.equal(kept[rows >= 0], states[taken]) and not kept[rows < 0].any()
    around = states._base.isnan().clone()
    joined = join_rows(rest, fresh, rows, inplace=True, impl="triton")
    assert torch.equal(joined[taken], fresh[rows >= 0])
    assert torch.equal(states._base.isnan(), around)


@pytest.mark.parametrize("shape", [(4, N, 7), (1, 1, 7), (1, N, 1)])
def test_expanded_gradients(device, shape):
    rows = ragged().to(device)
    states, weight = draw(device, torch.float32, (4, N, 7)), draw(device, torch.float32, (7,), 2)
    tensors = (states.requires_grad_(), weight.requires_grad_(), rows)
    upstream = draw(device, torch.float32, shape, 1)
    expanded, dense = upstream.expand(4, N, 7), upstream.expand(4, N, 7).contiguous()
    for mine, theirs in zip(results(*tensors, expanded, "triton"), results(*tensors, dense, "triton"), strict=True):
        assert torch.equal(mine, theirs)


def test_in_place_over_what_was_saved_is_noticed(device):
    rows = ragged().to(device)
    states = draw(device, torch.float32, (4, N, 7)).requires_grad_().clone()
    saved = states.square()
    rest, kept = split_rows(states, rows, "triton")
    joined = join_rows(rest, kept, rows, inplace=True, impl="triton")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (joined + saved).sum().backward()


def test_opcheck(device):
    rows = ragged(9).to(device)
    states, fresh = draw(device, torch.float32, (4, 9, 5)), draw(device, torch.float32, (4, 6, 5), 1)
    torch.library.opcheck(_gather_op.operator, (states, rows, "triton"))
    torch.library.opcheck(_write_op.operator, (states, fresh, rows, "triton"))


def test_every_tile_is_gated():
    from tokenseek_kernels.compilation import TARGETS

    gated = {(c.constants["ROWS"], c.constants["COLUMNS"]) for c in triton_module.compilations(TARGETS["sm_90"])}
    assert gated == {triton_module.tile(width) for width in range(1, 9000)}
