"""The Triton kernels of `selected_attention` and `causal_attention` against the dense reference."""

import importlib
import sys

import pytest
import torch

from tests.kernels.gaps import with_first_keys
from tokenseek_kernels import causal_attention, selected_attention
from tokenseek_kernels.scores import visible
from tokenseek_kernels.selected_attention.function import _backward_op, _forward_op, _overlay_op, overlay_

triton_module = importlib.import_module("tokenseek_kernels.selected_attention.triton")

KEYS = 50
RULES = {
    "causal": {},
    # with all rows and small blocks, one key or row more or less is a block more or less
    "window": {"window": 18},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "all": {"window": 31, "softcap": 2.0, "sinks": True, "scale": 0.3},
    "gaps": {"window": 25, "gaps": True},
    "all with gaps": {"window": 60, "gaps": True, "softcap": 2.0, "sinks": True, "scale": 0.3},
}
LAYOUTS = ("whole", "left", "right", "packed")
NAMES = ("output", "query", "key", "value", "sinks")


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that a tiny sequence has several of them, rows and keys of different size."""
    monkeypatch.setattr(triton_module, "choose_blocks", lambda *_: triton_module.Blocks(32, 16, 128, 2))


def draw_rows(counts, width, keys=KEYS):
    """As many random rows of each sequence as `counts` says, ascending, -1 behind them."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.full((len(counts), width), -1)
    for own, count in zip(rows, counts, strict=True):
        own[:count] = torch.randperm(keys, generator=generator)[:count].sort().values
    return rows


ROWS = draw_rows((37, 5), 37)


def make_segments(layout, device, keys=KEYS):
    if layout == "whole":
        return None
    segments = torch.zeros(2, keys, dtype=torch.long)
    if layout == "left":
        segments[0, :11], segments[1, :30] = -1, -1
    elif layout == "right":
        segments[0, keys - 3 :], segments[1, keys // 2 :] = -1, -1
    else:
        segments[0, 18:], segments[0, 35:], segments[1, 25:], segments[1, keys - 4 :] = 1, 2, 1, -1
    return segments.to(device)


class Case:
    """Leaves with gradient (query, fresh key, fresh value, sinks), scouted K and V, an upstream gradient, the rule."""

    def __init__(
        self, device, dtype, rows=ROWS, keys=KEYS, heads=(2, 1), dims=(16, 16), rule="causal", layout="whole"
    ):
        generator = torch.Generator().manual_seed(0)
        (n_heads, kv_heads), (dim, value_dim), (batch, k) = heads, dims, rows.shape

        def draw(*size):
            return torch.randn(*size, generator=generator, dtype=torch.float64).to(device, dtype)

        leaves = [draw(batch, n_heads, k, dim), draw(batch, kv_heads, k, dim), draw(batch, kv_heads, k, value_dim)]
        self.scouted = [draw(batch, kv_heads, keys, dim), draw(batch, kv_heads, keys, value_dim)]
        self.upstream = draw(batch, k, n_heads, value_dim)
        self.options = with_first_keys(RULES[rule], batch, keys)
        if "first_keys" in self.options:
            self.options["first_keys"] = self.options["first_keys"].to(device)
        if self.options.pop("sinks", False):
            leaves.append(draw(n_heads))
        self.leaves = [leaf.requires_grad_() for leaf in leaves]
        self.rows, self.segments = rows.to(device), make_segments(layout, device, keys)

    def run(self, impl, dtype=None):
        """Output and gradients of all leaves, through the door."""
        leaves = [leaf.detach().to(dtype or leaf.dtype).requires_grad_() for leaf in self.leaves]
        output = self.attend(impl, leaves)
        return [output.detach(), *torch.autograd.grad(output, leaves, self.upstream.to(output.dtype))]

    def attend(self, impl, leaves):
        query, key, value, *sinks = leaves
        scouted = [states.to(key.dtype, copy=True) for states in self.scouted]
        own = {**self.options, "sinks": sinks[0] if sinks else None}
        return selected_attention(query, key, value, *scouted, self.rows, self.segments, **own, impl=impl)

    def check(self):
        """
        Error against the float64 truth: at most twice that of the torch implementation in the same dtype, and
        rounding: 5e-6 for sums of other order in float32; 1e-2 for probabilities that meet V in bfloat16 (three of its
        roundings).
        """
        dtype = self.leaves[0].dtype
        rounding = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
        truth, theirs, ours = self.run("reference", torch.float64), self.run("torch"), self.run("triton")
        for name, right, other, own in zip(NAMES, truth, theirs, ours, strict=False):
            assert own.shape == right.shape and own.dtype == dtype, name
            allowed = 2 * (other.double() - right).abs().max() + rounding * right.abs().max().clamp(min=1)
            worst = (own.double() - right).abs().max()
            assert worst <= allowed, f"{name}: error {worst:.2e}, allowed {allowed:.2e}"
        return ours


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rule", RULES)
def test_equals_reference(small_blocks, device, rule, layout):
    Case(device, torch.float32, rule=rule, layout=layout).check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_sixteen_bits(small_blocks, device, rule, dtype):
    Case(device, dtype, rule=rule, layout="packed").check()


HEADS = {
    (7, 21): (2, 1),
    (32, 32): (4, 1),
    (64, 64): (2, 1),
    (80, 80): (2, 2),
    (96, 96): (4, 2),
    (128, 128): (2, 1),
    (192, 128): (2, 2),
    (256, 256): (1, 1),
}


@pytest.mark.parametrize("dims", HEADS, ids=str)
def test_head_sizes(small_blocks, device, dims):
    Case(device, torch.float32, heads=HEADS[dims], dims=dims).check()


@pytest.mark.parametrize(
    ("dims", "dtype"), [*((dims, torch.bfloat16) for dims in HEADS), ((64, 64), torch.float32)], ids=str
)
def test_blocks_of_a_launch(device, dims, dtype):
    """Several of rows and of keys, the last ones not full."""
    Case(device, dtype, draw_rows((141,), 150, keys=200), 200, HEADS[dims], dims).check()


@pytest.mark.parametrize(
    ("rows", "keys"),
    [
        (torch.tensor([[0], [29]]), 30),
        (torch.tensor([[0], [-1]]), 1),
        (torch.arange(48).expand(2, 48), 48),
        (torch.full((2, 3), -1), 30),
        (draw_rows((33, 0), 33, 64), 64),
        (torch.tensor([[30, 44, -1], [3, 47, -1]]), 48),
    ],
    ids=["one row", "one key", "all rows", "none", "one behind a block", "late rows"],
)
@pytest.mark.parametrize("rule", ["causal", "window", "all", "gaps"])
def test_extremes(small_blocks, device, rule, rows, keys):
    ours = Case(device, torch.float32, rows, keys, rule=rule).check()
    empty = (rows < 0).to(device)
    assert (ours[0][empty] == 0).all()
    for gradient in ours[1:4]:
        assert (gradient.transpose(1, 2)[empty] == 0).all()


@pytest.mark.parametrize("rule", ["causal", "all", "all with gaps"])
def test_float64(small_blocks, device, rule):
    Case(device, torch.float64, heads=(4, 2), dims=(8, 5), rule=rule, layout="packed").check()


@pytest.mark.parametrize(("rule", "layout"), [("causal", "whole"), ("all", "packed"), ("all with gaps", "packed")])
def test_gradcheck(small_blocks, device, rule, layout):
    case = Case(device, torch.float64, draw_rows((4, 2), 4), dims=(3, 2), rule=rule, layout=layout)
    assert torch.autograd.gradcheck(lambda *leaves: case.attend("triton", leaves), case.leaves, fast_mode=True)


@pytest.mark.parametrize("rule", ["causal", "window", "all", "gaps"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_leaks_from_what_nobody_sees(small_blocks, device, rule, layout):
    """Bit for bit: NaN in the future and in padding, anything finite in other documents or in front of the window."""
    case = Case(device, torch.float32, draw_rows((20, 5), 20, keys=44), rule=rule, layout=layout)
    before = case.run("triton")
    seen = visible(case.rows, case.segments, KEYS, case.options.get("window"), case.options.get("first_keys")).any(1)
    hopeless = torch.arange(KEYS, device=device) > case.rows.amax(1, keepdim=True)
    if case.segments is not None:
        hopeless = hopeless | (case.segments < 0)
    assert hopeless.any() and not (hopeless & seen).any()
    for states in (*case.scouted, *case.leaves[1:3]):
        poison = torch.where(hopeless, float("nan"), torch.where(seen, 0.0, 1e30))
        if states.shape[2] != KEYS:
            # of the fresh rows those of padding and of empty slots
            hidden = hopeless.gather(1, case.rows.clamp(min=0)) | (case.rows < 0)
            poison = torch.where(hidden, float("nan"), 0.0)
        states.data += poison[:, None, :, None]
    for name, one, other in zip(NAMES, before, case.run("triton"), strict=False):
        assert torch.equal(one, other), name


def test_documents_around_those_of_the_rows_are_not_read(small_blocks, device):
    case = Case(device, torch.float32, torch.tensor([[19, 22, 30, 34]]).expand(2, 4), layout="packed")
    case.segments = case.segments[:1].expand(2, -1)
    before = case.run("triton")
    for states in case.scouted:
        states[:, :, :18], states[:, :, 35:] = float("nan"), float("nan")
    for name, one, other in zip(NAMES, before, case.run("triton"), strict=False):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("dim", [16, 6])
def test_any_strides(small_blocks, device, dim):
    """Transposed projections inside larger tensors of NaN, of any alignment, and expanded upstream gradients."""
    case = Case(device, torch.float32, dims=(dim, dim), rule="sinks")
    case.upstream = case.upstream[:, :1, :, :1].expand_as(case.upstream)
    before = case.run("triton")

    def inside_nan(states):
        batch, heads, rows, dim = states.shape
        wide = states.new_full((batch, rows + 2, heads + 1, dim + 3), float("nan"))
        view = wide[:, 1:-1, 1:, 1:-2].transpose(1, 2)
        return view.copy_(states)

    leaves = [inside_nan(leaf.detach()) for leaf in case.leaves[:3]] + [leaf.detach() for leaf in case.leaves[3:]]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    scouted = [inside_nan(states) for states in case.scouted]
    own = {**case.options, "sinks": leaves[3]}
    output = selected_attention(*leaves[:3], *scouted, case.rows, case.segments, **own, impl="triton")
    after = torch.autograd.grad(output, leaves, case.upstream.contiguous())
    for name, one, other in zip(NAMES[1:], before[1:], after, strict=False):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dim", [16, 6, 80])
def test_overlay_writes_the_selected_rows_and_nothing_else(device, dim, dtype):
    generator = torch.Generator().manual_seed(0)
    # rows between others, heads innermost: as a model's projections come out
    fresh = torch.randn(2, 37, 3, 2 * dim, generator=generator).to(device)[..., ::2].transpose(1, 2)
    states = torch.randn(2, KEYS, 3, dim, generator=generator).to(device, dtype).transpose(1, 2)
    before, version = states.clone(), states._version
    overlay_(states, fresh, ROWS.to(device), "triton")
    assert states._version == version
    for sequence, rows in enumerate(ROWS):
        for position in range(KEYS):
            slot = (rows == position).nonzero()
            source = fresh[sequence, :, slot.item()].to(dtype) if len(slot) else before[sequence, :, position]
            assert torch.equal(states[sequence, :, position], source)
    torch.library.opcheck(_overlay_op.operator, (states, fresh, ROWS.to(device), "triton"))


def test_nothing_is_written_outside_of_the_results(small_blocks, device, monkeypatch):
    guard, buffers = 64, []

    def guarded(allocate):
        def allocate_inside(tensor, *size, **options):
            if not sys._getframe(1).f_globals["__name__"].endswith("selected_attention.triton"):
                return allocate(tensor, *size, **options)
            size = size or tensor.shape
            count = torch.Size(size).numel()
            buffers.append(tensor.new_full((count + 2 * guard,), 7.0, **options))
            return buffers[-1][guard : guard + count].view(size)

        return allocate_inside

    case = Case(device, torch.float32, dims=(16, 7), rule="all", layout="left")
    before = case.run("triton")
    monkeypatch.setattr(torch.Tensor, "new_empty", guarded(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", guarded(torch.empty_like))
    for one, other in zip(before, case.run("triton"), strict=True):
        assert torch.equal(one, other)
    # output, log-sum-exp, three gradients and delta at least
    assert len(buffers) >= 6
    for buffer in buffers:
        assert (buffer[:guard] == 7).all() and (buffer[-guard:] == 7).all()


def test_same_bits_every_time(small_blocks, device):
    case = Case(device, torch.bfloat16, rule="all")
    for one, other in zip(case.run("triton"), case.run("triton"), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("rule", "layout"), [("causal", "whole"), ("all", "left"), ("all with gaps", "left")])
def test_opcheck(small_blocks, device, rule, layout):
    case = Case(device, torch.float32, draw_rows((5, 2), 5), heads=(2, 2), dims=(8, 6), rule=rule, layout=layout)
    query, _, _, *sinks = (leaf.detach() for leaf in case.leaves)
    options = (case.options.get(name) for name in ("softcap", "window", "first_keys"))
    own = (case.options.get("scale", 0.5), *options, *(sinks or [None]))
    own = (case.rows, case.segments, *own, "triton")
    torch.library.opcheck(_forward_op.operator, (query, *case.scouted, *own))
    output, lse = _forward_op(query, *case.scouted, *own)
    torch.library.opcheck(_backward_op.operator, (case.upstream, query, *case.scouted, output, lse, *own))
    across = query.transpose(1, 2).contiguous().transpose(1, 2)
    torch.library.opcheck(_backward_op.operator, (case.upstream, across, *case.scouted, output, lse, *own))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rule", ["window", "softcap", "sinks", "all", "gaps", "all with gaps"])
def test_causal_attention(small_blocks, device, rule, layout):
    rows = torch.arange(KEYS).expand(2, KEYS)
    case = Case(device, torch.float32, rows, rule=rule, layout=layout)
    query, key, value, *sinks = (leaf.detach() for leaf in case.leaves)
    own = {**case.options, "sinks": sinks[0] if sinks else None}
    theirs = causal_attention(query, key, value, case.segments, **own, impl="torch")
    ours, lse = causal_attention(query, key, value, case.segments, **own, impl="triton", return_lse=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=5e-6)
    seen = visible(case.rows, case.segments, KEYS, own.get("window"), own.get("first_keys"))
    plain = (query.double() @ key.double().repeat_interleave(2, 1).mT) * own.get("scale", 16**-0.5)
    if "softcap" in own:
        plain = own["softcap"] * (plain / own["softcap"]).tanh()
    truth = plain.masked_fill(~seen[:, None], float("-inf")).logsumexp(-1)
    if sinks:
        truth = torch.logaddexp(truth, sinks[0].double()[:, None])
    truth = truth.masked_fill(~seen.any(-1)[:, None], float("inf"))
    torch.testing.assert_close(lse.double(), truth, rtol=1e-5, atol=5e-6)


def test_plain_causal_attention_is_torchs(device):
    query, key, value = torch.randn(3, 2, 2, 9, 8, device=device).unbind()
    output, lse = causal_attention(query, key, value, impl="triton", return_lse=True)
    assert lse is None
    assert torch.equal(output, causal_attention(query, key, value, impl="torch"))


@pytest.mark.parametrize(
    ("dtype", "dim", "limit"), [(torch.bfloat16, 257, 256), (torch.float32, 65, 64), (torch.float64, 33, 32)], ids=str
)
def test_large_heads_are_refused(device, dtype, dim, limit):
    with pytest.raises(ValueError, match=f"heads of up to {limit} in {dtype}, got {dim}. Use impl='torch'"):
        Case(device, dtype, dims=(16, dim)).run("triton")
