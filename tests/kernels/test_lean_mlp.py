import copy

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from transformers import Gemma2Config, GPT2Config, LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.gemma2.modeling_gemma2 import Gemma2MLP
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.llama.modeling_llama import LlamaMLP

from tests.kernels.lean_checks import ROUNDING, VIEWS, assert_as_good_as, cast, largest, results, saved_bytes
from tokenseek_kernels import ACTIVATIONS, activated_linear, gated_activation, gated_linear

NAMES = ["silu", "gelu", "gelu_tanh", "relu", "relu2"]
# what a model would call
TORCH = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}
SHAPE, OUT = (3, 7), 5


def make_inputs(width=20, shape=SHAPE, seed=0):
    """gate, up, weight, bias and an upstream gradient, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    tensors = 2 * normal(*shape, width), normal(*shape, width), normal(OUT, width), normal(OUT)
    return [tensor.requires_grad_() for tensor in tensors], normal(*shape, OUT)


def lean_gated(activation, impl="torch"):
    return lambda gate, up, weight, bias: gated_linear(gate, up, weight, bias, activation, impl=impl)


def plain_gated(activation):
    return lambda gate, up, weight, bias: F.linear(TORCH[activation](gate) * up, weight, bias)


def lean_plain(activation, impl="torch"):
    return lambda hidden, weight, bias: activated_linear(hidden, weight, bias, activation, impl=impl)


def plain_plain(activation):
    return lambda hidden, weight, bias: F.linear(TORCH[activation](hidden), weight, bias)


def truth_of(function, tensors, upstream):
    return results(function, cast(tensors, torch.float64), upstream.double())


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("width", [1, 7, 63, 100, 2000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_reference_and_plain_torch(dtype, width, activation):
    tensors, upstream = make_inputs(width)
    (gate, up, weight, bias), upstream = cast(tensors, dtype), upstream.to(dtype)
    for lean, plain, inputs in (
        (lean_gated, plain_gated, [gate, up, weight, bias]),
        (lean_gated, plain_gated, [gate, up, weight, None]),
        (lean_plain, plain_plain, [gate, weight, bias]),
    ):
        truth = truth_of(lean(activation, "reference"), inputs, upstream)
        found = results(lean(activation), inputs, upstream)
        theirs = results(plain(activation), inputs, upstream)
        assert torch.equal(found[0], theirs[0])
        assert_as_good_as(found, theirs, truth)

    upstream = upstream[..., :1].expand(gate.shape)
    found = results(lambda gate, up: gated_activation(gate, up, activation), [gate, up], upstream)
    theirs = results(lambda gate, up: TORCH[activation](gate) * up, [gate, up], upstream)
    naive = truth_of(lambda gate, up: gated_activation(gate, up, activation, impl="reference"), [gate, up], upstream)
    assert torch.equal(found[0], theirs[0])
    assert_as_good_as(found, theirs, naive)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_names_of_the_models(name):
    x = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    found = activated_linear(x[:, None], torch.ones(1, 1, dtype=torch.float64), None, ACTIVATIONS[name])[:, 0]
    # gelu_fast writes its constant with ten digits
    torch.testing.assert_close(found, ACT2FN[name](x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("activation", NAMES)
def test_gradcheck(activation):
    (gate, up, weight, bias), _ = make_inputs(4, (2, 3))
    torch.autograd.gradcheck(lean_gated(activation), (gate, up, weight, bias))
    torch.autograd.gradcheck(lean_plain(activation), (gate, weight, bias))
    torch.autograd.gradcheck(lambda gate, up: gated_activation(gate, up, activation), (gate, up))


def models_mlp(name):
    """A family's MLP, 24 wide and 100 inside, and a function that computes the same with ours."""
    sizes = {"hidden_size": 24, "intermediate_size": 100, "num_attention_heads": 4}
    if name == "gpt2":
        config = GPT2Config(n_embd=24, n_head=4, resid_pdrop=0.0)
        module, activation = GPT2MLP(100, config), config.activation_function
    elif name == "llama":
        config = LlamaConfig(**sizes, mlp_bias=True)
        module, activation = LlamaMLP(config), config.hidden_act
    else:
        config = Gemma2Config(**sizes)
        module, activation = Gemma2MLP(config), config.hidden_activation
    torch.manual_seed(0)
    for parameter in module.parameters():
        parameter.data.normal_(std=0.3)

    def lean(module, x):
        if name == "gpt2":
            # stores its weights as [in, out]
            layer = module.c_proj
            return activated_linear(module.c_fc(x), layer.weight.T, layer.bias, ACTIVATIONS[activation])
        layer = module.down_proj
        return gated_linear(module.gate_proj(x), module.up_proj(x), layer.weight, layer.bias, ACTIVATIONS[activation])

    return module, lean


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_equals_the_models_mlp(name, autocast, dtype, frozen):
    module, lean = models_mlp(name)
    module.to(dtype).requires_grad_(not frozen)
    exact = copy.deepcopy(module).double()
    x, upstream = (torch.randn(2, 9, 24, dtype=torch.float64).to(dtype) for _ in range(2))
    x.requires_grad_()

    def run(forward, module, x):
        return results(lambda x, *_: forward(module, x), [x, *module.parameters()], upstream)

    truth = run(type(exact).forward, exact, x.detach().double().requires_grad_())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, theirs = run(lean, module, x), run(type(module).forward, module, x)
    assert_as_good_as(found, theirs, truth)


@pytest.mark.parametrize("kept", [(1, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (1, 0, 0, 0), (0, 1, 1, 0), (1, 1, 1, 1)])
def test_only_what_needs_a_gradient_gets_one(kept):
    tensors, upstream = make_inputs()
    tensors = [t.detach().requires_grad_(bool(k)) for t, k in zip(tensors, kept, strict=True)]
    found = results(lean_gated("silu"), tensors, upstream)
    torch.testing.assert_close(found, results(plain_gated("silu"), tensors, upstream))
    del tensors[1]
    found = results(lean_plain("gelu"), tensors, upstream)
    torch.testing.assert_close(found, results(plain_plain("gelu"), tensors, upstream))


@pytest.mark.parametrize("weight_is_frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_bytes(dtype, weight_is_frozen):
    (gate, up, weight, bias), _ = make_inputs(100)
    gate, up, weight, bias = cast([gate, up, weight.requires_grad_(not weight_is_frozen), bias], dtype)
    row, rows = 100 * dtype.itemsize, 3 * 7
    assert saved_bytes(lambda: lean_gated("silu")(gate, up, weight, bias), weight) == 2 * rows * row
    assert saved_bytes(lambda: lean_plain("gelu")(gate, weight, bias), weight) == rows * row
    assert saved_bytes(lambda: gated_activation(gate, up, "relu")) == 2 * rows * row
    # plain: gate, up, act(gate), and the product where the weight is trained
    plain = saved_bytes(lambda: plain_gated("silu")(gate, up, weight, bias), weight)
    assert plain == (3 if weight_is_frozen else 4) * rows * row
    # two halves of one tensor, as in a fused gate_up_proj
    both = torch.cat([gate, up], -1).detach().requires_grad_()
    assert saved_bytes(lambda: lean_gated("silu")(*both.chunk(2, -1), weight, bias), weight) == 2 * rows * row
    # nothing but the weight's gradient, or nothing at all
    gate, up = gate.detach(), up.detach()
    if weight_is_frozen:
        assert saved_bytes(lambda: lean_gated("silu")(gate, up, weight, bias), weight) == 0
    else:
        assert saved_bytes(lambda: lean_gated("silu")(gate, up, weight, None), weight) == 2 * rows * row


def test_autocast_keeps_no_copy_and_fills_no_cache():
    tensors, upstream = make_inputs(100)
    gate, up, weight, bias = cast(tensors, torch.float32)
    gate, up = cast([gate, up], torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        saved = saved_bytes(lambda: lean_gated("silu")(gate, up, weight, bias), weight)
        assert saved == 2 * 21 * 100 * 2
        output = lean_gated("silu")(gate, up, weight, bias)
        # a plain layer with the same weight in the same block still trains it
        F.linear(gate, weight).sum().backward()
    assert output.dtype == torch.bfloat16
    assert weight.grad.any()


@pytest.mark.parametrize("gate_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_works_in_the_dtype_of_its_weight_or_of_autocast(autocast, gate_dtype):
    tensors, upstream = make_inputs(100)
    gate, up = cast(tensors[:2], gate_dtype)
    weight, bias = cast(tensors[2:], torch.float32)
    inputs = [gate, up, weight, bias]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = results(lean_gated("silu"), inputs, upstream)
        theirs = results(
            lambda gate, up, weight, bias: F.linear((F.silu(gate) * up).to(weight.dtype), weight, bias),
            inputs,
            upstream,
        )
    assert torch.equal(found[0], theirs[0])
    assert_as_good_as(found, theirs, truth_of(plain_gated("silu"), inputs, upstream))


def test_a_product_computed_before_is_used_and_gets_no_gradient():
    tensors, upstream = make_inputs()
    plain = results(plain_gated("silu"), tensors, upstream)
    product = (F.silu(tensors[0]) * tensors[1]).detach()

    def lean(gate, up, weight, bias):
        return gated_linear(gate, up, weight, bias, "silu", product=product)

    torch.testing.assert_close(results(lean, tensors, upstream), plain)
    product.requires_grad_()
    torch.testing.assert_close(results(lean, tensors, upstream), plain)
    assert product.grad is None
    with torch.no_grad():
        product.zero_()
    output = lean(*tensors)
    assert torch.equal(output, tensors[3].expand(output.shape))
    assert saved_bytes(lambda: lean(*tensors), tensors[2]) == 2 * tensors[0].nbytes
    hidden = activated_linear(tensors[0], tensors[2], None, "relu", product=product)
    assert not hidden.any()


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_non_contiguous_inputs_and_expanded_gradients(dtype, name):
    tensors, _ = make_inputs(40, (6, 10))
    inputs, view = cast(tensors, dtype), VIEWS[name]
    *leading, width = view(tensors[0]).shape

    def on_view(function):
        return lambda gate, up, weight, bias: function(view(gate), view(up), weight[:, :width], bias)

    for upstream in (torch.ones((), dtype=dtype), torch.linspace(-1, 2, OUT).to(dtype)):
        upstream = upstream.expand(*leading, OUT)
        found = results(on_view(lean_gated("gelu")), inputs, upstream)
        theirs = results(on_view(plain_gated("gelu")), inputs, upstream)
        assert_as_good_as(found, theirs, truth_of(on_view(plain_gated("gelu")), inputs, upstream))


def test_a_weight_stored_as_in_times_out():
    (gate, _, weight, bias), upstream = make_inputs()
    stored = weight.detach().T.contiguous().requires_grad_()
    found = results(lambda x, w, b: activated_linear(x, w.T, b, "gelu_tanh"), [gate, stored, bias], upstream)
    torch.testing.assert_close(found[2].T, results(lean_plain("gelu_tanh"), [gate, weight, bias], upstream)[2])
    assert saved_bytes(lambda: activated_linear(gate, stored.T, bias, "relu"), stored) == gate.nbytes


@pytest.mark.parametrize("activation", NAMES)
def test_writes_into_nothing_it_was_given(activation):
    tensors, upstream = make_inputs()
    given = [*tensors, upstream]
    before = [t.detach().clone() for t in given]
    for function, inputs, grad in (
        (lean_gated(activation), tensors, upstream),
        (lean_plain(activation), [tensors[0], *tensors[2:]], upstream),
        (lambda gate, up: gated_activation(gate, up, activation), tensors[:2], before[1]),
    ):
        output = function(*inputs)
        first = torch.autograd.grad(output, inputs, grad, retain_graph=True)
        second = torch.autograd.grad(output, inputs, grad)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, given, strict=True))
    torch.testing.assert_close(before[1], tensors[1].detach())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(use_reentrant):
    tensors, upstream = make_inputs()
    for function, inputs in ((lean_gated("silu"), tensors), (lean_plain("gelu"), [tensors[0], *tensors[2:]])):
        again = results(
            lambda *t, function=function: checkpoint(function, *t, use_reentrant=use_reentrant), inputs, upstream
        )
        assert all(torch.equal(a, b) for a, b in zip(results(function, inputs, upstream), again, strict=True))


def test_backward_under_autocast_is_that_without():
    tensors, upstream = make_inputs(100)
    inputs = cast(tensors, torch.float32)
    expected = results(lean_gated("silu"), inputs, upstream)
    output = lean_gated("silu")(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(output, inputs, upstream.float())
    for mine, theirs in zip(found, expected[1:], strict=True):
        assert largest(mine - theirs) <= ROUNDING[torch.float32] * largest(theirs)


def test_fake_tensors():
    with FakeTensorMode():
        gate, up = (torch.empty(4, 33, 100, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        weight = torch.empty(50, 100, dtype=torch.bfloat16, requires_grad=True)
        for output in (
            gated_linear(gate, up, weight),
            activated_linear(gate, weight, None, "gelu"),
            gated_activation(gate, up, "relu2"),
        ):
            output.sum().backward()
        assert gate.grad.shape == up.grad.shape == (4, 33, 100) and weight.grad.shape == (50, 100)


def test_no_rows():
    tensors, upstream = make_inputs(shape=(0, 7))
    for found in results(lean_gated("silu"), tensors, upstream)[3:]:
        assert not found.any()


def test_second_derivative_is_refused():
    tensors, _ = make_inputs()
    for output in (lean_gated("silu")(*tensors), gated_activation(*tensors[:2], "silu")):
        (gradient,) = torch.autograd.grad(output.square().sum(), tensors[0], create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "gelu_new"}, "ACTIVATIONS.*gelu_new"),
        ({"up": torch.ones(3, 9)}, r"`up` must be .*\[3, 10\]"),
        ({"up": torch.ones(3, 10, dtype=torch.bfloat16)}, "`up` must be torch.float32"),
        ({"product": torch.ones(3, 9)}, "`product`"),
        ({"weight": torch.ones(10, 4)}, r"`weight` must be \[out, 10\].*weight.T"),
        ({"bias": torch.ones(3)}, r"`bias` must be \[4\]"),
        ({"impl": "liger"}, "'liger'"),
        ({"impl": "triton"}, "triton"),
    ],
)
def test_errors_say_what_to_do(change, message):
    arguments = {"gate": torch.ones(3, 10), "up": torch.ones(3, 10), "weight": torch.ones(4, 10)} | change
    with pytest.raises(ValueError, match=message):
        gated_linear(**arguments)
