import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from tests.kernels.lean_checks import VIEWS, assert_as_good_as, cast, results, saved_bytes
from tokenseek_kernels import lora_delta
from tokenseek_kernels.lean_lora import reference

SCALING, OUT = 0.7, 11


def make_inputs(width=20, rank=4, shape=(3, 7), seed=0):
    """x, a, b and an upstream gradient, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    tensors = normal(*shape, width), normal(rank, width), normal(OUT, rank)
    return [tensor.requires_grad_() for tensor in tensors], normal(*shape, OUT)


def lean(dropout=0.0, impl="torch"):
    return lambda x, a, b: lora_delta(x, a, b, SCALING, dropout=dropout, seed=3 if dropout else None, impl=impl)


def check(tensors, upstream, dropout=0.0):
    truth = results(lean(dropout, "reference"), cast(tensors, torch.float64), upstream.double())
    theirs = results(lean(dropout, "reference"), tensors, upstream)
    assert_as_good_as(results(lean(dropout), tensors, upstream), theirs, truth)


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("width", [1, 7, 63, 100, 2000])
@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_reference(dtype, rank, width, dropout):
    tensors, upstream = make_inputs(width, rank)
    check(cast(tensors, dtype), upstream.to(dtype), dropout)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "float32")])
def test_x_in_another_dtype(dtypes, dropout):
    (x, a, b), upstream = make_inputs(100)
    x, adapter = cast([x], getattr(torch, dtypes[0])), cast([a, b], getattr(torch, dtypes[1]))
    check([*x, *adapter], upstream, dropout)


def peft_layer(dtype, adapter_dtype, dropout=0.0):
    """PEFT's layer around a frozen base of zeros, so that its output is the adapter's; always the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, OUT, bias=False)).to(dtype)
    model[0].weight.data.zero_()
    config = LoraConfig(r=4, lora_alpha=3, target_modules=["0"], lora_dropout=dropout, init_lora_weights=False)
    layer = inject_adapter_in_model(config, model)[0]
    layer.lora_A["default"].to(adapter_dtype)
    layer.lora_B["default"].to(adapter_dtype)
    return layer


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "dtypes", [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "bfloat16")]
)
def test_equals_peft(dtypes, autocast):
    dtype, adapter_dtype = (getattr(torch, name) for name in dtypes)
    layer = peft_layer(dtype, adapter_dtype)
    exact = copy.deepcopy(layer).double()
    (x, *_), upstream = make_inputs(100)
    (x,), upstream = cast([x], dtype), upstream.to(dtype)

    def adapter(layer):
        return layer.lora_A["default"].weight, layer.lora_B["default"].weight

    def run(forward, layer, x):
        return results(lambda x, *_: forward(x), [x, *adapter(layer)], upstream)

    truth = run(exact, exact, x.detach().double().requires_grad_())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        theirs = run(layer, layer, x)
        # PEFT rounds the sum to the dtype of the base layer's output
        found = run(lambda x: lora_delta(x, *adapter(layer), layer.scaling["default"]).to(layer(x).dtype), layer, x)
    assert torch.equal(found[0], theirs[0])
    assert_as_good_as(found, theirs, truth)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradcheck(dropout):
    tensors, _ = make_inputs(5, 2, (2, 3))
    torch.autograd.gradcheck(lean(dropout), tensors)


@pytest.mark.parametrize("shape", [(4096,), (3, 5, 7), (1,), (0, 4)])
def test_mask_follows_from_the_seed(shape):
    masks = [reference.dropped_elements(shape, torch.device("cpu"), 0.5, seed) for seed in (1, 1, 2)]
    assert masks[0].shape == shape
    assert torch.equal(masks[0], masks[1])
    assert masks[0].numel() < 100 or not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("dropout", [0.0, 0.05, 0.5, 0.9, 1 - 2**-16])
def test_mask_drops_its_share_everywhere(dropout):
    n = 2**20
    dropped = reference.dropped_elements((n,), torch.device("cpu"), dropout, 0).double()
    spread = (dropout * (1 - dropout)) ** 0.5
    # five standard deviations, for all elements, for each of the four that share a random number, and for neighbours
    assert abs(dropped.mean() - dropout) <= 5 * spread / n**0.5 + 2**-17
    assert ((dropped.view(-1, 4).mean(0) - dropout).abs() <= 5 * spread / (n / 4) ** 0.5 + 2**-17).all()
    together = (dropped[1:] * dropped[:-1]).mean()
    assert abs(together - dropout**2) <= 5 * spread / n**0.5 + 2**-16


def test_dropout_keeps_the_mean():
    tensors, _ = make_inputs()
    x, a, b = (t.detach() for t in tensors)
    deltas = [lora_delta(x, a, b, SCALING, dropout=0.25, seed=seed) for seed in range(4000)]
    mean, spread = torch.stack(deltas).mean(0), torch.stack(deltas).std(0)
    expected = lora_delta(x, a, b, SCALING)
    assert ((mean - expected).abs() <= 6 * spread / 4000**0.5).all()


def test_a_seed_is_drawn_from_torchs_generator():
    tensors, upstream = make_inputs()

    def run(seed):
        torch.manual_seed(seed)
        return results(lambda x, a, b: lora_delta(x, a, b, SCALING, dropout=0.5), tensors, upstream)

    assert all(torch.equal(a, b) for a, b in zip(run(0), run(0), strict=True))
    assert not torch.equal(run(0)[0], run(1)[0])
    # and none where there is nothing to drop
    torch.manual_seed(0)
    before = torch.get_rng_state()
    lora_delta(*tensors, SCALING)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_draws_the_same_mask(use_reentrant):
    tensors, upstream = make_inputs()

    def delta(x, a, b):
        return lora_delta(x, a, b, SCALING, dropout=0.5)

    torch.manual_seed(0)
    plain = results(delta, tensors, upstream)
    torch.manual_seed(0)
    again = results(lambda *t: checkpoint(delta, *t, use_reentrant=use_reentrant), tensors, upstream)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_saved_bytes(dropout):
    tensors, _ = make_inputs(100)
    rows, seed = 21, 8 if dropout else 0
    for dtype, adapter_dtype in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32)):
        (x,), (a, b) = cast(tensors[:1], dtype), cast(tensors[1:], adapter_dtype)

        def three_projections(x=x, a=a, b=b):
            return sum(lean(dropout)(x, a, b) for _ in range(3))

        one = rows * (100 * dtype.itemsize + 4 * adapter_dtype.itemsize) + seed
        assert saved_bytes(lambda x=x, a=a, b=b: lean(dropout)(x, a, b), a, b) == one
        three = rows * (100 * dtype.itemsize + 3 * 4 * adapter_dtype.itemsize) + 3 * seed
        assert saved_bytes(three_projections, a, b) == three


def test_saves_less_than_peft():
    layer = peft_layer(torch.bfloat16, torch.float32, dropout=0.1)
    (x, *_), _ = make_inputs(100)
    (x,) = cast([x], torch.bfloat16)
    parameters = [layer.get_base_layer().weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    # the dropped copy in float32, dropout's mask, on a CPU in float32 too, and the inner activation
    assert saved_bytes(lambda: layer(x), *parameters) == 21 * (100 * (4 + 4) + 4 * 4)
    assert saved_bytes(lambda: lora_delta(x, *parameters[1:], 1.0, dropout=0.1), *parameters) == 21 * (200 + 16) + 8


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("kept", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1), (1, 1, 0)])
def test_only_what_needs_a_gradient_gets_one(kept, dropout):
    tensors, upstream = make_inputs(100)
    x, a, b = (t.detach().requires_grad_(bool(k)) for t, k in zip(tensors, kept, strict=True))
    check([x, a, b], upstream, dropout)
    # x for A, the inner activation for B, nothing but parameters for x
    bytes_ = 8 * (21 * 100 * kept[1] + 21 * 4 * kept[2]) + (8 if dropout else 0)
    assert saved_bytes(lambda: lean(dropout)(x, a, b), a, b) == bytes_


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_non_contiguous_inputs_and_expanded_gradients(dtype, name):
    tensors, _ = make_inputs(40, shape=(6, 10))
    view = VIEWS[name]
    *leading, width = view(tensors[0]).shape

    def on_view(impl):
        return lambda x, a, b: lean(0.5, impl)(view(x), a[:, :width], b)

    inputs = cast(tensors, dtype)
    for upstream in (torch.ones((), dtype=dtype), torch.linspace(-1, 2, OUT).to(dtype)):
        upstream = upstream.expand(*leading, OUT)
        truth = results(on_view("reference"), cast(inputs, torch.float64), upstream.double())
        theirs = results(on_view("reference"), inputs, upstream)
        assert_as_good_as(results(on_view("torch"), inputs, upstream), theirs, truth)


def test_writes_into_nothing_it_was_given():
    tensors, upstream = make_inputs()
    before = [t.detach().clone() for t in (*tensors, upstream)]
    for dropout in (0.0, 0.5):
        output = lean(dropout)(*tensors)
        first = torch.autograd.grad(output, tensors, upstream, retain_graph=True)
        second = torch.autograd.grad(output, tensors, upstream)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, (*tensors, upstream), strict=True))


@pytest.mark.parametrize("seed", [None, 5])
def test_fake_tensors(seed):
    with FakeTensorMode():
        x = torch.empty(4, 33, 100, dtype=torch.bfloat16, requires_grad=True)
        a, b = torch.empty(8, 100, requires_grad=True), torch.empty(50, 8, requires_grad=True)
        output = lora_delta(x, a, b, 2.0, dropout=0.1, seed=seed)
        output.sum().backward()
        assert output.shape == (4, 33, 50) and output.dtype == torch.float32
        assert x.grad.dtype == torch.bfloat16 and a.grad.shape == a.shape and b.grad.shape == b.shape


def test_opcheck_of_the_mask():
    arguments = ([3, 5], torch.device("cpu"), 0.5, torch.tensor(3))
    torch.library.opcheck(torch.ops.tokenseek.dropped_elements, arguments)


def test_no_rows():
    tensors, upstream = make_inputs(shape=(0, 7))
    for dropout in (0.0, 0.5):
        assert not any(found.any() for found in results(lean(dropout), tensors, upstream))


def test_second_derivative_is_refused():
    tensors, _ = make_inputs()
    (gradient,) = torch.autograd.grad(lean()(*tensors).square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dropout": 1.0}, r"\[0, 1\), got 1.0"),
        ({"dropout": -0.1}, "got -0.1"),
        ({"a": torch.ones(4, 9)}, r"\[3, 10\], \[4, 9\] and \[5, 4\]"),
        ({"b": torch.ones(5, 3)}, r"\[out, rank\]"),
        ({"impl": "triton"}, r"\['torch', 'reference'\]"),
    ],
)
def test_errors_say_what_to_do(change, message):
    arguments = {"x": torch.ones(3, 10), "a": torch.ones(4, 10), "b": torch.ones(5, 4), "scaling": 1.0} | change
    with pytest.raises(ValueError, match=message):
        lora_delta(**arguments)
