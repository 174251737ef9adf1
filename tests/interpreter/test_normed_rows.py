"""The Triton kernels of `split_normed_rows`."""

import importlib

import pytest
import torch

from tests.interpreter.test_token_rows import draw, inside_nan, ragged
from tests.kernels.lean_checks import CONVENTIONS, assert_as_good_as, cast
from tests.kernels.test_normed_rows import EPS, fused, layer, one_by_one, results
from tokenseek_kernels.lean_norm.function import WIDEST
from tokenseek_kernels.lean_norm.triton import tile
from tokenseek_kernels.normed_rows.function import _gather_op, _write_op

triton_module = importlib.import_module("tokenseek_kernels.normed_rows.triton")


def tensors(device, dtype, n, width, wants=(True, True)):
    states, weight = draw(device, dtype, (4, n, width)), draw(device, dtype, (width,), 1)
    return [tensor.requires_grad_(own) for tensor, own in zip((states, weight), wants, strict=True)]


@pytest.mark.parametrize("rule", CONVENTIONS.values(), ids=CONVENTIONS)
@pytest.mark.parametrize(
    ("dtype", "width"),
    [
        # several rows a program, one, a part of the columns
        *((torch.float32, width) for width in (1, 7, 128, 200, 1100)),
        *((dtype, 200) for dtype in (torch.float64, torch.bfloat16, torch.float16)),
    ],
    ids=str,
)
def test_is_as_good_as_torch(device, dtype, width, rule):
    rows, own = ragged(12).to(device), tensors(device, dtype, 12, width)
    upstream = draw(device, torch.float64, (4, 12, width), 2)
    found = results(fused, own, upstream, rows, impl="triton", **rule)
    plain = results(one_by_one, own, upstream, rows, **rule)
    truth = results(one_by_one, cast(own, torch.float64), upstream, rows, **rule)
    assert_as_good_as(found, plain, truth)
    assert torch.equal(fused(own[0], rows, own[1], "triton")[1], one_by_one(own[0], rows, own[1])[1])


@pytest.mark.parametrize("wants", [(True, False), (False, True)], ids=str)
def test_gradients_that_nobody_asks_for(device, wants):
    rows, own = ragged(12).to(device), tensors(device, torch.float64, 12, 7, wants)
    upstream = draw(device, torch.float64, (4, 12, 7), 2)
    found, expected = (
        results(split, own, upstream, rows, impl=impl) for split, impl in ((fused, "triton"), (one_by_one, "torch"))
    )
    torch.testing.assert_close(found, expected)


def test_gradcheck(device):
    rows = torch.tensor([[0, 2], [1, -1]], device=device)
    states, weight = draw(device, torch.float64, (2, 3, 2)), draw(device, torch.float64, (2,), 1)
    inputs = states.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: layer(fused, x, w, rows, impl="triton"), inputs)


@pytest.mark.parametrize("k", [0, 1, 12])
def test_none_one_and_all(device, k):
    rows = torch.arange(k, device=device).expand(4, k)
    own, upstream = tensors(device, torch.float64, 12, 7), draw(device, torch.float64, (4, 12, 7), 2)
    found, expected = (
        results(split, own, upstream, rows, impl=impl) for split, impl in ((fused, "triton"), (one_by_one, "torch"))
    )
    torch.testing.assert_close(found, expected)


def test_more_rows_than_programs_that_add_up(device, monkeypatch):
    """Each program then goes through several tiles, the last one through fewer."""
    monkeypatch.setattr(triton_module, "PROGRAMS", 3)
    rows, own = ragged(12).to(device), tensors(device, torch.float64, 12, 600)
    upstream = draw(device, torch.float64, (4, 12, 600), 2)
    found, expected = (
        results(split, own, upstream, rows, impl=impl) for split, impl in ((fused, "triton"), (one_by_one, "torch"))
    )
    torch.testing.assert_close(found, expected)


def test_nothing_outside_of_the_rows_is_touched(device):
    """NaN around the stream and its gradient, in what is left out, and in slots without a row."""
    rows, (states, weight) = ragged(12).to(device), tensors(device, torch.float64, 12, 7, (False, False))
    taken = torch.zeros(4, 13, dtype=torch.bool, device=device).scatter_(1, rows % 13, True)[:, :12]
    states = inside_nan(states.masked_fill(~taken[..., None], float("nan")))
    _, kept, normed = fused(states, rows, weight, "triton")
    assert torch.equal(kept[rows >= 0], states[taken])
    assert not kept[rows < 0].any() and not normed[rows < 0].any() and normed.isfinite().all()

    wide = states.new_full((6, 14, 7), float("nan"))
    grad, rstd = wide[1:-1, 1:-1], (kept.square().mean(-1) + EPS).rsqrt().flatten()
    poison = torch.where(rows < 0, float("nan"), 1.0).to(states.dtype)[..., None].expand_as(kept)
    _write_op(grad, poison, poison, kept, rows, weight, rstd, 0.0, False)
    assert torch.equal(grad.isfinite().all(-1), taken)
    assert wide.isfinite().sum() == 7 * taken.sum()


def test_any_strides(device):
    rows, (states, weight) = ragged(12).to(device), tensors(device, torch.float64, 12, 8, (False, False))
    for view in (states.transpose(0, 1).contiguous().transpose(0, 1), states[..., ::2], states[:1].expand(4, -1, -1)):
        own = weight[: view.shape[-1]]
        for mine, theirs in zip(fused(view, rows, own, "triton"), one_by_one(view, rows, own), strict=True):
            torch.testing.assert_close(mine, theirs)


def test_opcheck(device):
    rows, (states, weight) = ragged(9).to(device), tensors(device, torch.float32, 9, 5, (False, False))
    rule = EPS, 0.0, True, torch.float32
    torch.library.opcheck(_gather_op.operator, (states, rows, weight, *rule))
    kept, normed, rstd = _gather_op(states, rows, weight, *rule)
    for needed in (False, True):
        torch.library.opcheck(_write_op.operator, (states, kept, normed, kept, rows, weight, rstd, 0.0, needed))


def test_too_wide_rows_are_refused(device):
    with pytest.raises(ValueError, match="impl='triton' takes up to 8192 features, got 8193"):
        fused(torch.zeros(1, 1, WIDEST + 1, device=device), torch.zeros(1, 1, dtype=torch.long), None, "triton")


def test_every_tile_is_gated():
    from tokenseek_kernels.compilation import TARGETS

    target = TARGETS["sm_90"]
    gated = {(c.constants["ROWS"], c.constants["COLUMNS"], c.num_warps) for c in triton_module.compilations(target)}
    assert gated == {tile(width, target) for width in range(1, WIDEST + 1)}
