import pytest
import torch
import torch.nn.functional as F

import tokenseek_kernels.scores as scores_module
from tests.kernels.gaps import first_keys_of, positions_with_gaps
from tokenseek_kernels import causal_attention, selected_attention

BATCH, HEADS, KEYS = 2, 4, 23
# where keys stand if tokens between them have been left out
PLACES = positions_with_gaps(BATCH, KEYS)
RULES = {
    "causal": {},
    "wide window": {"window": KEYS},
    "window": {"window": 4},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": torch.linspace(-1, 2, HEADS, dtype=torch.float64)},
    "all": {"window": 7, "softcap": 2.0, "scale": 0.3, "sinks": torch.linspace(-1, 2, HEADS, dtype=torch.float64)},
    "gaps": {"window": 9, "first_keys": first_keys_of(PLACES, 9)},
    # as many keys as there are, and yet some are hidden
    "wide window and gaps": {"window": KEYS, "first_keys": first_keys_of(PLACES, KEYS)},
}
LAYOUTS = {
    "whole": None,
    "left": torch.tensor([[-1] * 5 + [0] * (KEYS - 5), [0] * KEYS]),
    "packed": torch.tensor([[0] * 9 + [1] * (KEYS - 9), [0] * 3 + [1] * 4 + [2] * (KEYS - 8) + [-1]]),
    "nothing": torch.full((BATCH, KEYS), -1),
}


def draw(kv_heads=2, dim=8, value_dim=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    sizes = ((HEADS, dim), (kv_heads, dim), (kv_heads, value_dim))
    return [torch.randn(BATCH, h, KEYS, d, generator=generator, dtype=torch.float64).to(dtype) for h, d in sizes]


def loop(query, key, value, segments, scale=None, softcap=None, window=None, first_keys=None, sinks=None):
    """Row by row and head by head, from the words of the docstring."""
    output = torch.zeros(BATCH, KEYS, HEADS, value.shape[-1], dtype=query.dtype)
    group = HEADS // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    for b in range(BATCH):
        own = torch.zeros(KEYS) if segments is None else segments[b]
        at = range(KEYS) if first_keys is None else PLACES[b].tolist()
        for i in range(KEYS):
            sees = [j for j in range(i + 1) if own[j] == own[i] >= 0 and (window is None or at[i] - at[j] < window)]
            for h in range(HEADS if sees else 0):
                scores = key[b, h // group, sees] @ query[b, h, i] * scale
                if softcap is not None:
                    scores = softcap * (scores / softcap).tanh()
                exp = scores.exp()
                total = exp.sum() + (0 if sinks is None else sinks[h].exp())
                output[b, i, h] = exp / total @ value[b, h // group, sees]
    return output


@pytest.mark.parametrize("workspace", ["roomy", "tiny"])
@pytest.mark.parametrize("sizes", [(4, 8, 8), (2, 8, 8), (1, 7, 5)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rule", RULES)
def test_equals_the_definition(monkeypatch, rule, layout, sizes, workspace):
    if workspace == "tiny":
        monkeypatch.setattr(scores_module, "WORKSPACE_MIB", 0)
    query, key, value = draw(*sizes)
    truth = loop(query, key, value, LAYOUTS[layout], **RULES[rule])
    output = causal_attention(query, key, value, LAYOUTS[layout], **RULES[rule])
    assert output.is_contiguous()
    torch.testing.assert_close(output, truth)
    # the selected form of the same rule, and its dense reference
    rows = torch.arange(KEYS).expand(BATCH, KEYS)
    for impl in ("torch", "reference"):
        copies = key.clone(), value.clone()
        same = selected_attention(query, key, value, *copies, rows, LAYOUTS[layout], **RULES[rule], impl=impl)
        torch.testing.assert_close(same, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_plain_causality_is_bit_for_bit_torchs(kv_heads, dtype):
    query, key, value = draw(kv_heads, dtype=dtype)
    theirs = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    assert torch.equal(causal_attention(query, key, value), theirs.transpose(1, 2))


@pytest.mark.parametrize("rule", RULES)
def test_storage_order_does_not_matter(rule):
    """Models hand over transposed projections."""
    query, key, value = draw()
    across = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key, value)]
    rows = torch.arange(KEYS).expand(BATCH, KEYS)
    torch.testing.assert_close(
        causal_attention(*across, **RULES[rule]), causal_attention(query, key, value, **RULES[rule])
    )
    leaves = [t.detach().requires_grad_() for t in across], [t.detach().requires_grad_() for t in (query, key, value)]
    upstream = torch.randn(BATCH, HEADS, KEYS, 8, dtype=torch.float64).transpose(1, 2)
    one, other = (
        torch.autograd.grad(selected_attention(*own, key.clone(), value.clone(), rows, **RULES[rule]), own, upstream)
        for own in leaves
    )
    for left, right in zip(one, other, strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("rule", ["window", "all"])
def test_autocast_does_not_reach_inside(rule):
    """Sums stay in float32 under autocast as well."""
    options = {k: v.bfloat16() if torch.is_tensor(v) else v for k, v in RULES[rule].items()}
    query, key, value = draw(dtype=torch.bfloat16)
    before = causal_attention(query, key, value, **options)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(causal_attention(query, key, value, **options), before)


def test_the_log_sum_exp_is_given_where_it_is_free():
    """Torch's kernels do not give it."""
    query, key, value = draw()
    for options in RULES.values():
        output, lse = causal_attention(query, key, value, **options, return_lse=True)
        assert lse is None
        assert torch.equal(output, causal_attention(query, key, value, **options))


def test_triton_needs_a_gpu(monkeypatch):
    monkeypatch.setattr("tokenseek_kernels.dispatch.is_interpreting", lambda: False)
    query, key, value = draw()
    rows = torch.arange(KEYS).expand(BATCH, KEYS)
    needs_a_gpu = pytest.raises(ValueError, match=r"impl='triton' needs a tensor on .*'cuda'.*got one on 'cpu'")
    with needs_a_gpu:
        causal_attention(query, key, value, impl="triton")
    with needs_a_gpu:
        selected_attention(query, key, value, key.clone(), value.clone(), rows, impl="triton")
    with pytest.raises(ValueError, match=r"impl.*\['triton', 'torch'\], got 'reference'"):
        causal_attention(query, key, value, impl="reference")


@pytest.mark.parametrize(
    ("dtype", "limit"),
    [(torch.bfloat16, 256), (torch.float16, 256), (torch.float32, 64), (torch.float64, 32)],
    ids=str,
)
def test_heads_too_large_for_triton_go_to_torch(monkeypatch, dtype, limit):
    monkeypatch.setattr(scores_module, "resolve_impl", lambda impl, *_: "triton" if impl == "auto" else impl)
    resolve = scores_module.resolve_attention_impl
    fits, large = torch.empty(1, 1, 1, limit, dtype=dtype), torch.empty(1, 1, 1, limit + 1, dtype=dtype)
    assert resolve("auto", fits, limit) == "triton"
    assert resolve("auto", large) == resolve("auto", fits, limit + 1) == "torch"
    # what is asked for by name is not replaced
    assert resolve("triton", large) == "triton" and resolve("reference", fits) == "reference"


def test_errors_name_the_value_and_the_next_step():
    query, key, value = draw()
    rows = torch.arange(KEYS).expand(BATCH, KEYS)

    def call(query=query, fresh=(key, value), key=key, rows=rows, segments=None, **options):
        return selected_attention(query, *fresh, key.clone(), value.clone(), rows, segments, **options)

    with pytest.raises(ValueError, match=r"impl.*'auto'.*'torch'.*'triton9'"):
        call(impl="triton9")
    with pytest.raises(ValueError, match=r"must not require grad.*torch.no_grad"):
        call(key=key.clone().requires_grad_())
    with pytest.raises(ValueError, match=r"query heads \(3\) must be a multiple of key/value heads \(2\)"):
        call(query=query[:, :3])
    with pytest.raises(ValueError, match=r"`rows` \(2, 22\)"):
        call(rows=rows[:, 1:])
    with pytest.raises(ValueError, match=r"`fresh_key` \(2, 2, 20, 8\).*23 rows"):
        call(fresh=(key[:, :, 3:], value))
    with pytest.raises(ValueError, match=r"`fresh_value` \(2, 1, 23, 8\).*`value` \(2, 2, 23, 8\)"):
        call(fresh=(key, value[:, :1]))
    with pytest.raises(ValueError, match=r"`segments` \(2, 5\)"):
        call(segments=torch.zeros(2, 5, dtype=torch.long))


@pytest.mark.parametrize("layout", ["whole", "left", "packed"])
@pytest.mark.parametrize("rule", RULES)
def test_gradients_are_those_of_the_definition(rule, layout):
    leaves = [states.requires_grad_() for states in draw()]
    options = dict(RULES[rule])
    if "sinks" in options:
        options["sinks"] = options["sinks"].clone().requires_grad_()
        leaves.append(options["sinks"])
    upstream = torch.randn(BATCH, KEYS, HEADS, 8, dtype=torch.float64)
    found, truth = (
        torch.autograd.grad(attend(*leaves[:3], LAYOUTS[layout], **options), leaves, upstream)
        for attend in (causal_attention, loop)
    )
    for computed, expected in zip(found, truth, strict=True):
        torch.testing.assert_close(computed, expected, rtol=1e-10, atol=1e-12)
