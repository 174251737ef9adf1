"""The Triton kernel of `block_scores` against the dense reference."""

import importlib

import pytest
import torch

from tokenseek_kernels import block_scores
from tokenseek_kernels.block_scores.function import QUERIES, _scores_op
from tokenseek_kernels.compilation import TARGETS

triton_module = importlib.import_module("tokenseek_kernels.block_scores.triton")

N = 50
LAYOUTS = {
    "whole": None,
    "left": torch.tensor([[-1] * 8 + [0] * 42, [-1] * 35 + [0] * 15]),
    "packed": torch.tensor([[0] * 14 + [1] * 20 + [2] * 16, [0] * 32 + [1] * 18]),
}


@pytest.fixture
def few_programs(monkeypatch):
    """So few that a program works on several blocks of queries, one more or one less than another."""
    monkeypatch.setattr(triton_module, "PROGRAMS", 12)


def draw(device, dtype=torch.float32, heads=(2, 1), dim=16, layout="whole", n=N):
    """`(query, key, segments)`"""
    generator = torch.Generator().manual_seed(0)
    states = (torch.randn(2, h, n, dim, generator=generator, dtype=torch.float64) for h in heads)
    segments = LAYOUTS[layout]
    return *(state.to(device, dtype) for state in states), None if segments is None else segments.to(device)


def exact(query, key, segments, block, queries):
    """The dense reference in float64."""
    return block_scores(query.double(), key.double(), block, segments, queries=queries, impl="reference")


def assert_close(scores, truth):
    """Sums of a few hundred products are right to a few units of float32."""
    precise = scores.dtype == torch.float64
    torch.testing.assert_close(
        scores.double(), truth, rtol=1e-12 if precise else 1e-5, atol=1e-12 if precise else 1e-5
    )
    # a block without a pair gets nothing, to the bit
    assert (scores[truth == 0] == 0).all()


@pytest.mark.parametrize("queries", QUERIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_reference(few_programs, device, layout, queries):
    query, key, segments = draw(device, layout=layout)
    for impl in ("triton", "torch"):
        scores = block_scores(query, key, 16, segments, queries=queries, impl=impl)
        assert_close(scores, exact(query, key, segments, 16, queries))


@pytest.mark.parametrize("queries", QUERIES)
@pytest.mark.parametrize(
    ("block", "tile"), [(32, (16, 16)), (32, (16, 32)), (32, (32, 16)), (64, (16, 32)), (128, (64, 64))], ids=str
)
def test_a_tile_in_parts(monkeypatch, device, block, tile, queries):
    """The last block is short: parts of it have no token at all."""
    monkeypatch.setattr(triton_module, "choose_tile", lambda *_: triton_module.Blocks(*tile, 128, 2))
    query, key, segments = draw(device, layout="packed")
    scores = block_scores(query, key, block, segments, queries=queries, impl="triton")
    assert_close(scores, exact(query, key, segments, block, queries))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_tiles_of_a_launch(device, block, dtype):
    query, key, segments = draw(device, dtype, (4, 2), 32, n=150)
    scores = block_scores(query, key, block, segments, queries="later", impl="triton")
    assert scores.dtype == torch.promote_types(dtype, torch.float32)
    assert_close(scores, exact(query, key, segments, block, "later"))


HEADS = {7: (2, 1), 64: (4, 1), 80: (2, 2), 128: (4, 2), 256: (1, 1)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", HEADS)
def test_head_sizes(device, dim, dtype):
    query, key, segments = draw(device, dtype, HEADS[dim], dim, "left")
    if dim > 64 and dtype == torch.float32:
        with pytest.raises(ValueError, match="heads of up to 64"):
            block_scores(query, key, 16, segments, impl="triton")
        return
    scores = block_scores(query, key, 16, segments, impl="triton")
    assert_close(scores, exact(query, key, segments, 16, "all"))


@pytest.mark.parametrize("queries", QUERIES)
def test_nothing_leaks_from_padding(few_programs, device, queries):
    """NaN in padding, bit for bit."""
    query, key, segments = draw(device, layout="left")
    before = block_scores(query, key, 16, segments, queries=queries, impl="triton")
    poison = torch.where(segments < 0, float("nan"), 0.0)[:, None, :, None]
    after = block_scores(query + poison, key + poison, 16, segments, queries=queries, impl="triton")
    assert torch.equal(before, after)
    # the first two blocks of the second sequence are padding
    assert (before[1] == 0).tolist() == [True, True, False, False]


def test_any_strides(device):
    query, key, _ = draw(device, dim=6)
    before = block_scores(query, key, 16, impl="triton")

    def inside_nan(states):
        batch, heads, count, dim = states.shape
        wide = states.new_full((batch, count + 2, heads + 1, dim + 3), float("nan"))
        return wide[:, 1:-1, 1:, 1:-2].transpose(1, 2).copy_(states)

    assert torch.equal(before, block_scores(inside_nan(query), inside_nan(key), 16, impl="triton"))


def test_same_bits_every_time(few_programs, device):
    query, key, segments = draw(device, torch.bfloat16, (4, 2), layout="packed")
    one, other = (block_scores(query, key, 16, segments, impl="triton") for _ in range(2))
    assert torch.equal(one, other)


@pytest.mark.parametrize("block", [1, 8, 24, 48])
def test_blocks_that_are_not_fit_go_to_torch(monkeypatch, device, block):
    query, key, segments = draw(device, layout="left")
    with pytest.raises(
        ValueError, match=f"blocks of a power of two of at least 16 tokens, got {block}. Use impl='auto'"
    ):
        block_scores(query, key, block, segments, impl="triton")
    # where Triton would be chosen
    monkeypatch.setattr("tokenseek_kernels.dispatch.TRITON_DEVICES", ("cpu", "cuda"))
    found = block_scores(query, key, block, segments)
    assert torch.equal(found, block_scores(query, key, block, segments, impl="torch"))


def test_opcheck(device):
    query, key, segments = draw(device, layout="left")
    torch.library.opcheck(_scores_op.operator, (query, key, 16, None, "all", "triton"))
    torch.library.opcheck(_scores_op.operator, (query, key, 16, segments, "later", "triton"))


@pytest.mark.parametrize("target", TARGETS)
def test_every_tile_is_gated(target):
    target = TARGETS[target]
    gated = {
        (c.types["query"], c.constants["BLOCK_DIM"], c.constants["BLOCK_ROWS"], c.constants["BLOCK_KEYS"], c.num_warps)
        for c in triton_module.compilations(target)
    }
    for (dim, itemsize), name in (
        (entry, {2: "*bf16", 4: "*fp32", 8: "*fp64"}[entry[1]]) for entry in triton_module.TILES
    ):
        dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[itemsize]
        for block in (16, 32, 64, 128, 1024):
            tile = triton_module.choose_tile(block, dim, dtype, target)
            assert (name, dim, tile.rows, tile.keys, tile.threads // target.warp_size) in gated
