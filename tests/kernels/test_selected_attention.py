import itertools

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import tokenseek_kernels.scores as scores_module
from tests.kernels.gaps import first_keys_of, positions_with_gaps, with_first_keys
from tokenseek_kernels import selected_attention
from tokenseek_kernels.selected_attention.function import _backward_op, _forward_op, overlay_

HEADS, KEYS = 4, 19
RULES = {
    "causal": {},
    "window": {"window": 4},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "all": {"window": 7, "softcap": 2.0, "sinks": True, "scale": 0.3},
    "gaps": {"window": 9, "gaps": True},
    "all with gaps": {"window": 17, "gaps": True, "softcap": 2.0, "sinks": True, "scale": 0.3},
}
# kv_heads, dim, value_dim
SHAPES = {"mha": (4, 8, 8), "gqa": (2, 7, 7), "mqa": (1, 8, 5)}
LAYOUTS = ("whole", "left", "packed")
# one sequence with every kind of row, one with fewer rows, one with none
ROWS = torch.tensor([[5, 6, 11, 17, 18], [7, 12, 18, -1, -1], [-1, -1, -1, -1, -1]])


def make_segments(layout):
    if layout == "whole":
        return None
    segments = torch.zeros(3, KEYS, dtype=torch.long)
    if layout == "left":
        for sequence, padding in enumerate((5, 2, KEYS)):
            segments[sequence, :padding] = -1
    else:
        segments[0, 6:], segments[0, 12:], segments[1, 12:], segments[1, 13:] = 1, 2, 1, 2
        segments[2, 15:] = -1
    return segments


def make_inputs(shape="gqa", rule="causal", rows=ROWS, keys=KEYS, dtype=torch.float64, seed=0):
    """Leaves with gradient (query, fresh key, fresh value, sinks), scouted K and V, and an upstream gradient."""
    kv_heads, dim, value_dim = SHAPES[shape]
    generator = torch.Generator().manual_seed(seed)
    batch, count = rows.shape
    options = with_first_keys(RULES[rule], batch, keys)

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    leaves = [draw(batch, HEADS, count, dim), *(draw(batch, kv_heads, count, d) for d in (dim, value_dim))]
    scouted = [draw(batch, kv_heads, keys, d) for d in (dim, value_dim)]
    upstream = draw(batch, count, HEADS, value_dim)
    if options.pop("sinks", False):
        leaves.append(draw(HEADS))
    return [leaf.requires_grad_() for leaf in leaves], scouted, upstream, options


def attend(leaves, scouted, rows, segments, options, **how):
    query, key, value, *sinks = leaves
    copies = [states.clone() for states in scouted]
    sinks = sinks[0] if sinks else None
    return selected_attention(query, key, value, *copies, rows, segments, sinks=sinks, **options, **how)


def values_and_gradients(leaves, scouted, upstream, rows, segments, options, **how):
    output = attend(leaves, scouted, rows, segments, options, **how)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream.to(output.dtype))]


def assert_as_good_as_reference(inputs, rows, segments):
    """Error against the float64 truth: at most twice that of the dense reference in the same dtype, and rounding."""
    leaves, scouted, upstream, options = inputs
    dtype = upstream.dtype
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    truth = values_and_gradients(
        exact, [s.double() for s in scouted], upstream.double(), rows, segments, options, impl="reference"
    )
    dense = values_and_gradients(*inputs[:3], rows, segments, options, impl="reference")
    ours = values_and_gradients(*inputs[:3], rows, segments, options, impl="torch")
    # one rounding of the result, and sums over keys in float32 or float64
    sums = torch.finfo(torch.promote_types(dtype, torch.float32)).eps * scouted[0].shape[2]
    for name, right, naive, own in zip(("output", "query", "key", "value", "sinks"), truth, dense, ours, strict=False):
        assert own.shape == right.shape and own.dtype == dtype, name
        rounding = (torch.finfo(dtype).eps + sums) * right.abs().max().clamp(min=1)
        allowed = 2 * (naive.double() - right).abs().max() + rounding
        worst = (own.double() - right).abs()
        place = worst.argmax()
        detail = [float(t.flatten()[place]) for t in (right, naive, own)]
        assert worst.max() <= allowed, f"{name}: truth, reference, ours at the worst element: {detail}"


@pytest.mark.parametrize("workspace", ["roomy", "tiny"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "rule", "layout"), list(itertools.product(SHAPES, RULES, LAYOUTS)))
def test_equals_reference(monkeypatch, shape, rule, layout, dtype, workspace):
    if workspace == "tiny":
        monkeypatch.setattr(scores_module, "WORKSPACE_MIB", 0)  # every row a block of its own
    assert_as_good_as_reference(make_inputs(shape, rule, dtype=dtype), ROWS, make_segments(layout))


@pytest.mark.parametrize("rows", [[[0]], [[62]], [list(range(63))], [[0, 1, 2, 31, 32, 61, 62]]], ids=len)
@pytest.mark.parametrize("rule", RULES)
def test_odd_sizes_and_extremes(rows, rule):
    rows = torch.tensor(rows)
    assert_as_good_as_reference(make_inputs("gqa", rule, rows, 63, torch.float32), rows, None)


@pytest.mark.parametrize("shape", ["mha", "gqa"])
def test_all_rows_equal_torchs_causal_attention(shape):
    rows = torch.arange(KEYS).expand(2, KEYS)
    leaves, scouted, upstream, options = make_inputs(shape, rows=rows)
    ours = values_and_gradients(leaves, scouted, upstream, rows, None, options)
    plain = F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True).transpose(1, 2)
    for own, theirs in zip(ours, [plain, *torch.autograd.grad(plain, leaves, upstream)], strict=True):
        torch.testing.assert_close(own, theirs)


@pytest.mark.parametrize("rule", ["causal", "all", "all with gaps"])
def test_gradcheck(rule):
    rows = torch.tensor([[1, 4], [5, -1]])
    segments = torch.tensor([[-1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1]])
    leaves, scouted, _, options = make_inputs("gqa", rule, rows, 6)
    assert torch.autograd.gradcheck(lambda *args: attend(args, scouted, rows, segments, options), leaves)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_whoever_sees_anything_sees_itself(rule, layout):
    window, first_keys = (make_inputs("gqa", rule)[3].get(name) for name in ("window", "first_keys"))
    segments = make_segments(layout)
    rows = torch.cat([torch.arange(KEYS).expand(3, -1), torch.full((3, 2), -1)], 1)
    seen = scores_module.visible(rows, segments, KEYS, window, first_keys)
    assert torch.equal(scores_module.sees_itself(rows, segments), seen.any(-1))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("layout", ["left", "packed"])
def test_invisible_columns_reach_nothing(rule, layout):
    """Bit for bit, whatever finite thing stands there. (NaN would pass, as it passes torch's own masked attention.)"""
    leaves, scouted, upstream, options = make_inputs("gqa", rule)
    segments = make_segments(layout)
    before = values_and_gradients(leaves, scouted, upstream, ROWS, segments, options)
    seen = scores_module.visible(ROWS, segments, KEYS, options.get("window"), options.get("first_keys")).any(1)
    assert not seen.all()
    poison = torch.where(seen[:, None, :, None], 0.0, 1e30)
    after = values_and_gradients(leaves, [s + poison for s in scouted], upstream, ROWS, segments, options)
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_that_are_left_out_are_as_if_they_were_padding(layout):
    """At their positions among the others, with keys and values that nobody sees."""
    leaves, scouted, upstream, options = make_inputs("gqa", "all")
    positions, segments, n = positions_with_gaps(len(ROWS), KEYS), make_segments(layout), 12 * KEYS + 1
    options["window"] = 17
    found = values_and_gradients(
        leaves, scouted, upstream, ROWS, segments, {**options, "first_keys": first_keys_of(positions, 17)}
    )
    everywhere = torch.full((len(ROWS), n), -1).scatter(
        1, positions, torch.zeros_like(positions) if segments is None else segments
    )
    index = positions[:, None, :, None]
    spread = [s.new_full((*s.shape[:2], n, s.shape[3]), 1e3).scatter(2, index.expand_as(s), s) for s in scouted]
    at = positions.gather(1, ROWS.clamp(min=0)).masked_fill(ROWS < 0, -1)
    expected = values_and_gradients(leaves, spread, upstream, at, everywhere, options)
    torch.testing.assert_close(found, expected)


def test_empty_slots_give_and_receive_nothing():
    leaves, scouted, upstream, options = make_inputs("gqa", "all")
    rows, empty = ROWS[:2], (ROWS[:2] < 0)
    leaves = [leaf.detach()[:2].clone().requires_grad_() for leaf in leaves[:3]] + leaves[3:]
    scouted, upstream = [s[:2] for s in scouted], upstream[:2]
    before = values_and_gradients(leaves, scouted, upstream, rows, None, options)
    with torch.no_grad():
        leaves[1].masked_fill_(empty[:, None, :, None], float("nan"))
        leaves[2].masked_fill_(empty[:, None, :, None], float("nan"))
    after = values_and_gradients(leaves, scouted, upstream, rows, None, options)
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other)
    assert (before[0][empty] == 0).all()
    for gradient in before[1:4]:
        assert (gradient.transpose(1, 2)[empty] == 0).all()


def test_expanded_upstream_gradient():
    leaves, scouted, upstream, options = make_inputs("gqa", "sinks")
    expanded = upstream[:1, :1, :, :1].expand(upstream.shape)
    ours = values_and_gradients(leaves, scouted, expanded, ROWS, None, options)
    theirs = values_and_gradients(leaves, scouted, expanded.contiguous(), ROWS, None, options)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_saves_what_the_docstring_says(shape, dtype):
    leaves, scouted, _, options = make_inputs(shape, "sinks", dtype=dtype)
    segments = make_segments("packed")
    known = {t.untyped_storage()._cdata for t in (*leaves[1:], *scouted, ROWS, segments)}
    saved = {}

    def count(tensor):
        return saved.setdefault(tensor.untyped_storage()._cdata, tensor)

    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.setdefault(t.untyped_storage()._cdata, t), lambda t: t
    ):
        output = selected_attention(*leaves[:3], *scouted, ROWS, segments, sinks=leaves[3], **options)
    assert output.requires_grad
    batch, heads, rows, dim = leaves[0].shape
    element = dtype.itemsize
    own = sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in known)
    assert own == batch * rows * heads * (dim + scouted[1].shape[-1]) * element + batch * heads * rows * 4
    assert {s.untyped_storage()._cdata for s in scouted} <= set(saved)
    # the fresh rows live on in the scouted tensors only
    assert not {leaf.untyped_storage()._cdata for leaf in leaves[1:3]} & set(saved)


def test_overlay_writes_exactly_the_selected_rows():
    rows = ROWS[:2]
    (_, fresh, *_), (states, _), *_ = make_inputs("gqa", rows=rows)
    written = states.clone()
    overlay_(written, fresh.detach(), rows, "torch")
    for sequence, position in itertools.product(range(2), range(KEYS)):
        slot = (rows[sequence] == position).nonzero()
        source = fresh[sequence, :, slot.item()] if len(slot) else states[sequence, :, position]
        assert torch.equal(written[sequence, :, position], source)


@pytest.mark.parametrize("rule", ["causal", "all", "all with gaps"])
def test_fake_tensors(rule):
    with FakeTensorMode():
        (query, key, value, *sinks), scouted, upstream, options = fake_inputs(rule)
        options["sinks"] = sinks[0] if sinks else None
        rows = torch.zeros(2, 3, dtype=torch.long)
        output = selected_attention(query, key, value, *scouted, rows, **options)
        assert output.shape == upstream.shape and output.is_contiguous()
        output.backward(upstream)
        for leaf in (query, key, value, *sinks):
            assert leaf.grad.shape == leaf.shape and leaf.grad.dtype == leaf.dtype


def fake_inputs(rule):
    options = with_first_keys(RULES[rule], 2, KEYS)
    leaves = [torch.empty(2, HEADS, 3, 8), torch.empty(2, 2, 3, 8), torch.empty(2, 2, 3, 6)]
    leaves += [torch.empty(HEADS)] if options.pop("sinks", False) else []
    scouted = [torch.empty(2, 2, KEYS, 8), torch.empty(2, 2, KEYS, 6)]
    return [leaf.requires_grad_() for leaf in leaves], scouted, torch.empty(2, 3, HEADS, 6), options


@pytest.mark.parametrize("rule", ["causal", "all", "all with gaps"])
def test_opcheck(rule):
    leaves, (key, value), upstream, options = make_inputs("gqa", rule, dtype=torch.float32)
    query, *sinks = [leaf.detach() for leaf in (leaves[0], *leaves[3:])]
    segments = make_segments("left")
    sinks = sinks[0] if sinks else None
    rule_args = (
        options.get("scale", 0.5),
        options.get("softcap"),
        options.get("window"),
        options.get("first_keys"),
        sinks,
        "torch",
    )
    torch.library.opcheck(_forward_op.operator, (query, key, value, ROWS, segments, *rule_args))
    output, lse = _forward_op(query, key, value, ROWS, segments, *rule_args)
    arguments = (upstream, query, key, value, output, lse, ROWS, segments, *rule_args)
    torch.library.opcheck(_backward_op.operator, arguments)
