"""The Triton kernel of `attention_mass` against the dense reference."""

import importlib

import pytest
import torch

from tests.kernels.gaps import with_first_keys
from tokenseek_kernels import attention_mass, causal_attention
from tokenseek_kernels.attention_mass.function import _mass_op
from tokenseek_kernels.scores import visible

triton_module = importlib.import_module("tokenseek_kernels.attention_mass.triton")
attention_module = importlib.import_module("tokenseek_kernels.selected_attention.triton")

KEYS = 50
RULES = {
    "causal": {},
    # with all rows and small blocks, one row more or less is a block more or less
    "window": {"window": 18},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "all": {"window": 31, "softcap": 2.0, "sinks": True, "scale": 0.3},
    "gaps": {"window": 25, "gaps": True},
    "all with gaps": {"window": 60, "gaps": True, "softcap": 2.0, "sinks": True, "scale": 0.3},
}
# -1 behind the rows, in front of them and between them; one sequence has few
ROWS = torch.full((2, 40), -1)
ROWS[0, 3:15], ROWS[0, 20:38] = torch.arange(8, 20), torch.arange(30, 48)
ROWS[1, :3] = torch.tensor([31, 32, 49])
LAYOUTS = {
    "whole": None,
    "left": torch.tensor([[-1] * 8 + [0] * 42, [-1] * 31 + [0] * 19]),
    "packed": torch.tensor([[0] * 14 + [1] * 20 + [2] * 16, [0] * 32 + [1] * 18]),
}


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that a tiny sequence has several of them, rows and keys of different size."""
    for module in (triton_module, attention_module):
        monkeypatch.setattr(module, "choose_blocks", lambda *_: attention_module.Blocks(16, 32, 128, 2))


def draw(device, dtype=torch.float32, heads=(2, 1), dim=16, rule="causal", layout="whole", rows=ROWS, keys=KEYS):
    """Arguments of the door, and its keywords."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((len(rows), heads[0], rows.shape[1], dim), (len(rows), heads[1], keys, dim), (heads[0],))
    query, key, sinks = (torch.randn(*s, generator=generator, dtype=torch.float64).to(device, dtype) for s in sizes)
    own = {"sinks": sinks}
    options = {name: own.get(name, value) for name, value in with_first_keys(RULES[rule], len(rows), keys).items()}
    options |= {"first_keys": options["first_keys"].to(device)} if "first_keys" in options else {}
    segments = LAYOUTS[layout]
    return (query, key, rows.to(device), None if segments is None else segments.to(device)), options


def exact(arguments, options):
    """The dense reference in float64."""
    query, key, rows, segments = arguments
    options = {name: value.double() if name == "sinks" else value for name, value in options.items()}
    return attention_mass(query.double(), key.double(), rows, segments, **options, impl="reference")


def log_sum_exp(arguments, options):
    """The rows' log-sum-exp in float64, from the words of the docstring."""
    query, key, rows, segments = arguments
    scores = query.double() @ key.double().repeat_interleave(query.shape[1] // key.shape[1], 1).mT
    scores *= options.get("scale", query.shape[-1] ** -0.5)
    if "softcap" in options:
        scores = options["softcap"] * (scores / options["softcap"]).tanh()
    seen = visible(rows, segments, key.shape[2], options.get("window"), options.get("first_keys"))[:, None]
    lse = scores.masked_fill(~seen, float("-inf")).logsumexp(-1)
    if "sinks" in options:
        lse = torch.logaddexp(lse, options["sinks"].double()[:, None])
    return lse.masked_fill(~seen.any(-1), float("inf"))


def assert_close(mass, truth):
    """Every term is right to a few units of float32, and so is their sum."""
    assert mass.dtype == torch.float32
    torch.testing.assert_close(mass.double(), truth, rtol=1e-5, atol=1e-5)
    # what cannot be seen gets nothing, to the bit
    assert (mass[truth == 0] == 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rule", RULES)
def test_equals_reference(small_blocks, device, rule, layout):
    arguments, options = draw(device, rule=rule, layout=layout)
    truth, lse = exact(arguments, options), log_sum_exp(arguments, options).float()
    for impl in ("triton", "torch"):
        assert_close(attention_mass(*arguments, **options, impl=impl), truth)
        assert_close(attention_mass(*arguments, **options, lse=lse, impl=impl), truth)


HEADS = {7: (2, 1), 32: (4, 1), 64: (2, 1), 80: (2, 2), 96: (4, 2), 128: (2, 1), 256: (1, 1)}


@pytest.mark.parametrize("dim", HEADS)
def test_head_sizes(small_blocks, device, dim):
    arguments, options = draw(device, heads=HEADS[dim], dim=dim)
    assert_close(attention_mass(*arguments, **options, impl="triton"), exact(arguments, options))


@pytest.mark.parametrize(
    ("dim", "dtype"), [*((dim, torch.bfloat16) for dim in HEADS), (64, torch.float16), (64, torch.float32)], ids=str
)
def test_blocks_of_a_launch(device, dim, dtype):
    """Several of rows and of keys, the last ones not full."""
    rows = torch.cat([torch.full((1, 20), -1), torch.arange(20, 200, 2)[None], torch.full((1, 40), -1)], 1)
    arguments, options = draw(device, dtype, HEADS[dim], dim, rows=rows, keys=203)
    assert_close(attention_mass(*arguments, **options, impl="triton"), exact(arguments, options))


@pytest.mark.parametrize(
    "rows",
    [
        torch.tensor([[0], [49]]),
        torch.arange(50).expand(2, 50),
        torch.arange(17, 50).expand(2, 33),
        torch.full((2, 3), -1),
    ],
    ids=["one row", "all rows", "many rows", "none"],
)
@pytest.mark.parametrize("rule", ["causal", "window", "all", "all with gaps"])
def test_extremes(small_blocks, device, rule, rows):
    arguments, options = draw(device, rule=rule, rows=rows)
    assert_close(attention_mass(*arguments, **options, impl="triton"), exact(arguments, options))


@pytest.mark.parametrize("layout", ["whole", "left"])
def test_nothing_leaks_from_what_nobody_sees(small_blocks, device, layout):
    """NaN in padding and in the future, bit for bit."""
    rows = ROWS.clamp(max=45)
    rows[1, :3] = torch.tensor([31, 32, 40])
    (query, key, rows, segments), options = draw(device, layout=layout, rows=rows)
    before = attention_mass(query, key, rows, segments, **options, impl="triton")
    hidden = ~visible(rows, segments, KEYS, None).any(1)
    assert hidden.any(1).all()
    poison = torch.where(hidden, float("nan"), 0.0)[:, None, :, None]
    assert torch.equal(before, attention_mass(query, key + poison, rows, segments, **options, impl="triton"))


def test_any_strides(small_blocks, device):
    (query, key, rows, _), options = draw(device, dim=6)
    before = attention_mass(query, key, rows, **options, impl="triton")

    def inside_nan(states):
        batch, heads, count, dim = states.shape
        wide = states.new_full((batch, count + 2, heads + 1, dim + 3), float("nan"))
        return wide[:, 1:-1, 1:, 1:-2].transpose(1, 2).copy_(states)

    after = attention_mass(inside_nan(query), inside_nan(key), rows, **options, impl="triton")
    assert torch.equal(before, after)


def test_same_bits_every_time(small_blocks, device):
    arguments, options = draw(device, torch.bfloat16, (4, 2), rule="all", layout="packed")
    one, other = (attention_mass(*arguments, **options, impl="triton") for _ in range(2))
    assert torch.equal(one, other)


@pytest.mark.parametrize("rule", ["window", "all", "all with gaps"])
def test_takes_the_log_sum_exp_of_causal_attention(small_blocks, device, rule):
    rows = torch.arange(KEYS).expand(2, KEYS)
    (query, key, rows, segments), options = draw(device, rows=rows, rule=rule, layout="packed")
    _, lse = causal_attention(query, key, key, segments, **options, return_lse=True, impl="triton")
    mass = attention_mass(query, key, rows, segments, **options, lse=lse, impl="triton")
    assert_close(mass, exact((query, key, rows, segments), options))


def test_opcheck(small_blocks, device):
    (query, key, rows, segments), options = draw(device, rows=ROWS[:, :4], layout="left", rule="all with gaps")
    rule = (0.5, None, options["window"], options["first_keys"], options["sinks"])
    for lse in (None, torch.ones(2, 2, 4, device=device)):
        torch.library.opcheck(_mass_op.operator, (query, key, rows, segments, *rule, lse, "triton"))
