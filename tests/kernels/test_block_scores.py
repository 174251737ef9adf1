import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import tokenseek_kernels.scores as scores_module
from tokenseek_kernels import block_scores
from tokenseek_kernels.block_scores import blocked
from tokenseek_kernels.block_scores.function import QUERIES, _scores_op

BATCH, HEADS, N, DIM = 3, 4, 21, 7
BLOCKS = [1, 4, 7, 16, 21, 30]
LAYOUTS = {
    "whole": None,
    "left": torch.tensor([[-1] * 6 + [0] * 15, [-1] * 2 + [0] * 19, [-1] * 21]),
    "packed": torch.tensor([[0] * 7 + [1] * 14, [0] * 5 + [1] * 15 + [-1], [0] * 21]),
}
IMPLEMENTATIONS = ["torch", "reference"]


def draw(kv_heads=2, dtype=torch.float64, n=N, heads=HEADS):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(BATCH, heads, n, DIM, generator=generator, dtype=torch.float64)
    key = torch.randn(BATCH, kv_heads, n, DIM, generator=generator, dtype=torch.float64)
    return query.to(dtype), key.to(dtype)


def counts(i, j, own, queries):
    return own[i] == own[j] >= 0 and (queries == "all" or (i >= j if queries == "later" else i <= j))


def loop(query, key, block, segments, queries):
    """Pair by pair and tile by tile, from the words of the docstring."""
    batch, heads, n, _ = query.shape
    tiles = torch.zeros(batch, -(-n // block), -(-n // block), dtype=torch.float64)
    group = heads // key.shape[1]
    # tile[i // block, j // block] is the largest of its pairs, and 0 without one
    for b in range(batch):
        own = [0] * n if segments is None else segments[b].tolist()
        products = (query[b].view(-1, group, n, DIM) @ key[b, :, None].mT).relu().sum((0, 1)) / heads
        for i, row in enumerate(products.tolist()):
            for j, score in enumerate(row):
                if counts(i, j, own, queries):
                    tile = tiles[b, i // block, j // block]
                    tile.fill_(max(tile.item(), score))
    return tiles.sum(1)


@pytest.mark.parametrize("workspace", ["roomy", "tiny"])
@pytest.mark.parametrize("queries", QUERIES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block", BLOCKS)
def test_equals_the_definition(monkeypatch, block, layout, queries, workspace):
    if workspace == "tiny":
        monkeypatch.setattr(scores_module, "WORKSPACE_MIB", 0)
    query, key = draw()
    truth = loop(query, key, block, LAYOUTS[layout], queries)
    for impl in IMPLEMENTATIONS:
        scores = block_scores(query, key, block, LAYOUTS[layout], queries=queries, impl=impl)
        assert scores.shape == (BATCH, -(-N // block)) and scores.dtype == torch.float64
        torch.testing.assert_close(scores, truth)
        assert (scores[truth == 0] == 0).all()


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_grouped_heads_serve_their_group(kv_heads):
    query, key = draw(kv_heads)
    spread = key.repeat_interleave(HEADS // kv_heads, 1)
    for impl in IMPLEMENTATIONS:
        torch.testing.assert_close(block_scores(query, key, 4, impl=impl), loop(query, spread, 4, None, "all"))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("queries", QUERIES)
def test_single_tokens_are_column_sums(queries, impl):
    query, key = draw(HEADS)
    pairs = (query @ key.mT).relu().mean(1)
    pairs = {"all": pairs, "later": pairs.tril(), "earlier": pairs.triu()}[queries]
    torch.testing.assert_close(block_scores(query, key, 1, queries=queries, impl=impl), pairs.sum(1))


@pytest.mark.parametrize("block", BLOCKS)
def test_no_less_than_the_mean_of_the_tokens(block):
    """A tile's largest pair is at least its mean pair."""
    query, key = draw()
    tokens = torch.nn.functional.pad(block_scores(query, key, 1), (0, -N % block)).unflatten(1, (-1, block)).sum(-1)
    # zeros of pairs that are not there make a mean smaller
    assert (block_scores(query, key, block) >= tokens / block**2).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("queries", QUERIES)
def test_scores_follow_the_length_of_queries_and_keys(queries, impl):
    query, key = draw(dtype=torch.float32)
    scores = block_scores(query, key, 4, LAYOUTS["packed"], queries=queries, impl=impl)
    # powers of two round nothing
    for scaled in ((4 * query, key), (query, 4 * key)):
        assert torch.equal(4 * scores, block_scores(*scaled, 4, LAYOUTS["packed"], queries=queries, impl=impl))
    assert (scores >= 0).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_head_of_zeros_only_lowers_the_mean(impl):
    query, key = draw(HEADS)
    more = [torch.cat([states, torch.zeros_like(states[:, :1])], 1) for states in (query, key)]
    truth = block_scores(query, key, 4, impl=impl) * HEADS / (HEADS + 1)
    torch.testing.assert_close(block_scores(*more, 4, impl=impl), truth)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_later_and_earlier_pairs_are_all_pairs(layout):
    query, key = draw()
    of = {
        (queries, block): block_scores(query, key, block, LAYOUTS[layout], queries=queries)
        for queries in QUERIES
        for block in (1, 4)
    }
    # a token's pair with itself is in both
    own = block_scores(query.flatten(0, 2)[:, None, None], key.repeat_interleave(2, 1).flatten(0, 2)[:, None, None], 1)
    own = own.view(BATCH, HEADS, N).mean(1)
    if LAYOUTS[layout] is not None:
        own = own.masked_fill(LAYOUTS[layout] < 0, 0.0)
    torch.testing.assert_close(of["later", 1] + of["earlier", 1], of["all", 1] + own)
    assert (of["later", 4] + of["earlier", 4] >= of["all", 4] - 1e-12).all()
    assert (torch.maximum(of["later", 4], of["earlier", 4]) <= of["all", 4] + 1e-12).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_earlier_queries_know_nothing_of_later_tokens(impl):
    query, key = draw()
    before = {queries: block_scores(query, key, 4, queries=queries, impl=impl) for queries in QUERIES}
    query[:, :, 12:], key[:, :, 12:] = -query[:, :, 12:], key[:, :, 12:] + 1
    after = {queries: block_scores(query, key, 4, queries=queries, impl=impl) for queries in QUERIES}
    assert torch.equal(before["earlier"][:, :3], after["earlier"][:, :3])
    # the published score does
    assert not torch.isclose(before["all"][:, :3], after["all"][:, :3]).any()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("queries", QUERIES)
@pytest.mark.parametrize("layout", ["left", "packed"])
def test_nothing_leaks_from_padding(layout, queries, impl):
    query, key = draw()
    segments = LAYOUTS[layout]
    before = block_scores(query, key, 4, segments, queries=queries, impl=impl)
    poison = torch.where(segments < 0, float("nan"), 0.0)[:, None, :, None]
    assert torch.equal(before, block_scores(query + poison, key + poison, 4, segments, queries=queries, impl=impl))
    padding = torch.nn.functional.pad(segments, (0, -N % 4), value=-1).unflatten(1, (-1, 4)).amax(-1) < 0
    assert (before[padding] == 0).all() and (before[~padding] > 0).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_sums_in_float32(dtype, impl):
    """The inputs are rounded; nothing behind them is."""
    query, key = draw(dtype=dtype)
    truth = loop(query.double(), key.double(), 4, LAYOUTS["packed"], "later")
    with torch.autocast("cpu", torch.bfloat16):
        scores = block_scores(query, key, 4, LAYOUTS["packed"], queries="later", impl=impl)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), truth, rtol=1e-5, atol=1e-5)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that an operator returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("queries", QUERIES)
def test_memory_is_linear_in_the_length(monkeypatch, queries):
    monkeypatch.setattr(scores_module, "WORKSPACE_MIB", 0)
    for n in (64, 128, 256):
        with LargestTensor() as largest:
            blocked.block_scores(*draw(n=n), 8, None, queries)
        # a block of query rows, for every head
        assert largest.elements == BATCH * HEADS * 8 * n


def test_has_no_gradient():
    query, key = draw()
    for impl in IMPLEMENTATIONS:
        assert not block_scores(query.requires_grad_(), key.requires_grad_(), 4, impl=impl).requires_grad


def test_fake_tensors_and_opcheck():
    query, key = draw(dtype=torch.float32)
    for segments, queries in ((None, "all"), (LAYOUTS["left"], "later")):
        torch.library.opcheck(_scores_op.operator, (query, key, 4, segments, queries, "torch"))
    with FakeTensorMode() as mode:
        # what looks into operators to count their bytes runs their functions as well
        scores = _scores_op.function(*map(mode.from_tensor, (query, key)), 4, None, "all", "torch")
        assert scores.shape == (BATCH, 6)
        scores = block_scores(torch.empty(2, 4, 9, 8), torch.empty(2, 2, 9, 8), 4)
        assert scores.shape == (2, 3) and scores.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": 0}, "`block` should be at least 1 token, got 0"),
        ({"queries": "past"}, r"`queries` should be one of \['all', 'later', 'earlier'\], got 'past'"),
        ({"key": draw(3)[1]}, r"`key` \(3, 3, 21, 7\) must have the shape of `query` \(3, 4, 21, 7\)"),
        ({"key": draw(n=20)[1]}, r"`key` \(3, 2, 20, 7\) must have the shape of `query`"),
        ({"segments": torch.zeros(3, 20)}, r"`segments` \(3, 20\) must be \(batch, n\) of query \(3, 4, 21, 7\)"),
        ({"impl": "fast"}, r"impl.*\['triton', 'torch', 'reference'\].*'fast'"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    query, key = draw()
    with pytest.raises(ValueError, match=message):
        block_scores(**{"query": query, "key": key, "block": 4, **change})


def test_triton_needs_a_gpu(monkeypatch):
    monkeypatch.setattr("tokenseek_kernels.dispatch.is_interpreting", lambda: False)
    with pytest.raises(ValueError, match=r"impl='triton' needs a tensor on .*'cuda'.*got one on 'cpu'.*impl='auto'"):
        block_scores(*draw(), 16, impl="triton")
