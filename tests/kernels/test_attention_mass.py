import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import tokenseek_kernels.scores as scores_module
from tests.kernels.gaps import first_keys_of, positions_with_gaps
from tokenseek_kernels import attention_mass
from tokenseek_kernels.attention_mass.function import _mass_op
from tokenseek_kernels.selected_attention.function import _forward_op

BATCH, HEADS, KEYS, DIM = 3, 4, 21, 7
# where keys stand if tokens between them have been left out
PLACES = positions_with_gaps(BATCH, KEYS)
SINKS = torch.linspace(-1, 2, HEADS, dtype=torch.float64)
RULES = {
    "causal": {},
    "window": {"window": 4},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": SINKS},
    "all": {"window": 7, "softcap": 2.0, "scale": 0.3, "sinks": SINKS},
    "gaps": {"window": 9, "first_keys": first_keys_of(PLACES, 9)},
    "all with gaps": {
        "window": 17,
        "first_keys": first_keys_of(PLACES, 17),
        "softcap": 2.0,
        "scale": 0.3,
        "sinks": SINKS,
    },
}
# queries of real tokens in every layout below; -1 slots, and a sequence without any
ROWS = torch.tensor([[6, 7, 13, 20], [5, 19, -1, -1], [-1, -1, -1, -1]])
LAYOUTS = {
    "whole": None,
    "left": torch.tensor([[-1] * 6 + [0] * 15, [-1] * 2 + [0] * 19, [-1] * 21]),
    "packed": torch.tensor([[0] * 7 + [1] * 14, [0] * 5 + [1] * 15 + [-1], [0] * 21]),
}


def draw(kv_heads=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(BATCH, HEADS, ROWS.shape[1], DIM, generator=generator, dtype=torch.float64)
    key = torch.randn(BATCH, kv_heads, KEYS, DIM, generator=generator, dtype=torch.float64)
    return query.to(dtype), key.to(dtype)


def loop(query, key, segments, scale=None, softcap=None, window=None, first_keys=None, sinks=None):
    """Query by query and head by head, from the words of the docstring."""
    mass = torch.zeros(BATCH, KEYS, dtype=torch.float64)
    scale = DIM**-0.5 if scale is None else scale
    for b in range(BATCH):
        own = torch.zeros(KEYS) if segments is None else segments[b]
        at = range(KEYS) if first_keys is None else PLACES[b].tolist()
        for slot, i in enumerate(ROWS[b].tolist()):
            sees = [j for j in range(i + 1) if own[j] == own[i] >= 0 and (window is None or at[i] - at[j] < window)]
            for h in range(HEADS if sees else 0):
                scores = key[b, h // (HEADS // key.shape[1]), sees] @ query[b, h, slot] * scale
                if softcap is not None:
                    scores = softcap * (scores / softcap).tanh()
                exp = scores.exp()
                mass[b, sees] += exp / (exp.sum() + (0 if sinks is None else sinks[h].exp()))
    return mass


@pytest.mark.parametrize("workspace", ["roomy", "tiny"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rule", RULES)
def test_equals_the_definition(monkeypatch, rule, layout, kv_heads, workspace):
    if workspace == "tiny":
        monkeypatch.setattr(scores_module, "WORKSPACE_MIB", 0)
    query, key = draw(kv_heads)
    segments = LAYOUTS[layout]
    truth = loop(query, key, segments, **RULES[rule])
    mass = attention_mass(query, key, ROWS, segments, **RULES[rule])
    assert mass.dtype == torch.float32
    # float64 terms added up in float32
    torch.testing.assert_close(mass.double(), truth, rtol=1e-5, atol=1e-6)
    reference = attention_mass(query, key, ROWS, segments, **RULES[rule], impl="reference")
    torch.testing.assert_close(reference.double(), truth)
    # what cannot be seen gets nothing, to the bit
    assert (mass[truth == 0] == 0).all()
    assert (mass[2] == 0).all()
    if segments is not None:
        assert (mass[segments < 0] == 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rule", RULES)
def test_the_log_sum_exp_may_be_given(monkeypatch, rule, layout):
    monkeypatch.setattr(scores_module, "WORKSPACE_MIB", 0)
    query, key = draw()
    options, segments = RULES[rule], LAYOUTS[layout]
    # the log-sum-exp of selected_attention, whose values matter to nobody here
    own = (options.get("scale", DIM**-0.5), *map(options.get, ("softcap", "window", "first_keys", "sinks")))
    _, lse = _forward_op(query, key, key, ROWS, segments, *own, "torch")
    mass = attention_mass(query, key, ROWS, segments, **options, lse=lse)
    torch.testing.assert_close(mass.double(), loop(query, key, segments, **options), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"`lse` \(3, 4, 3\) must be \(batch, heads, rows\) of query \(3, 4, 4, 7\)"):
        attention_mass(query, key, ROWS, segments, **options, lse=lse[..., 1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", ["causal", "window", "softcap"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_query_gives_one_of_each_head(layout, rule, dtype):
    query, key = draw(dtype=dtype)
    mass = attention_mass(query, key, ROWS, LAYOUTS[layout], **RULES[rule])
    expected = HEADS * (ROWS >= 0).sum(1).float()
    torch.testing.assert_close(mass.sum(1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_low_precision_sums_in_float32(rule, dtype):
    """The inputs are rounded; nothing behind them is."""
    query, key = draw(dtype=dtype)
    truth = loop(query.double(), key.double(), LAYOUTS["packed"], **RULES[rule])
    options = {name: v.float() if name == "sinks" else v for name, v in RULES[rule].items()}
    with torch.autocast("cpu", torch.bfloat16):
        mass = attention_mass(query, key, ROWS, LAYOUTS["packed"], **options)
    torch.testing.assert_close(mass.double(), truth, rtol=1e-5, atol=1e-5)


def test_fake_tensors_and_opcheck():
    query, key = draw(dtype=torch.float32)
    for segments, options in (
        (None, RULES["causal"]),
        (LAYOUTS["left"], RULES["all"]),
        (LAYOUTS["left"], RULES["gaps"]),
    ):
        sinks = None if options.get("sinks") is None else options["sinks"].float()
        rule = (0.5, options.get("softcap"), options.get("window"), options.get("first_keys"), sinks)
        for lse in (None, torch.ones(query.shape[:3])):
            torch.library.opcheck(_mass_op.operator, (query, key, ROWS, segments, *rule, lse, "torch"))
    with FakeTensorMode():
        mass = attention_mass(torch.empty(2, 4, 3, 8), torch.empty(2, 2, 9, 8), torch.zeros(2, 3, dtype=torch.long))
        assert mass.shape == (2, 9) and mass.dtype == torch.float32


def test_unknown_impl_is_refused():
    with pytest.raises(ValueError, match=r"impl.*\['triton', 'torch', 'reference'\].*'fast'"):
        attention_mass(*draw(), ROWS, impl="fast")


def test_triton_needs_a_gpu(monkeypatch):
    monkeypatch.setattr("tokenseek_kernels.dispatch.is_interpreting", lambda: False)
    with pytest.raises(ValueError, match=r"impl='triton' needs a tensor on .*'cuda'.*got one on 'cpu'.*impl='auto'"):
        attention_mass(*draw(), ROWS, impl="triton")
