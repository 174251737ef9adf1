import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.nanochat.modeling_nanochat import NanoChatRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from tests.kernels.lean_checks import CONVENTIONS, VIEWS, assert_as_good_as, cast, largest, results, saved_bytes
from tokenseek_kernels import layer_norm, rms_norm
from tokenseek_kernels.lean_norm import eager

EPS = 1e-6
MODULES = {
    LlamaRMSNorm: "llama",
    Qwen3RMSNorm: "llama",
    Olmo2RMSNorm: "olmo2",
    Gemma3nRMSNorm: "olmo2",
    Gemma2RMSNorm: "gemma",
}
WIDTHS = [1, 7, 63, 100, 2000]


def make_inputs(shape, with_bias=False, seed=0):
    """x, weight, perhaps bias, and an upstream gradient, in float64."""
    generator = torch.Generator().manual_seed(seed)
    x, upstream = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    parameters = torch.randn(1 + with_bias, shape[-1], generator=generator, dtype=torch.float64)
    # rows of very different size
    x *= 10 ** torch.linspace(-3, 2, shape[0], dtype=torch.float64).view(-1, *[1] * (len(shape) - 1))
    return [x.requires_grad_(), *(parameter.clone().requires_grad_() for parameter in parameters)], upstream


def calls(convention):
    """The operation and its reference as functions of x and weight."""
    options = CONVENTIONS[convention]
    return (
        lambda x, weight: rms_norm(x, weight, EPS, **options),
        lambda x, weight: rms_norm(x, weight, EPS, impl="reference", **options),
    )


def layer_calls():
    return lambda *tensors: layer_norm(*tensors, EPS), lambda *tensors: layer_norm(*tensors, EPS, impl="reference")


def check_against_truth(operation, naive, tensors, upstream, dtype):
    """Compares in `dtype`; the truth starts from the same rounded inputs."""
    tensors, upstream = cast(tensors, dtype), upstream.to(dtype)
    truth = results(naive, cast(tensors, torch.float64), upstream.double())
    assert_as_good_as(results(operation, tensors, upstream), results(naive, tensors, upstream), truth)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rms_norm_equals_reference(dtype, width, convention):
    tensors, upstream = make_inputs((5, 13, width))
    check_against_truth(*calls(convention), tensors, upstream, dtype)


@pytest.mark.parametrize("width", WIDTHS[1:])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_layer_norm_equals_reference(dtype, width):
    tensors, upstream = make_inputs((5, 13, width), with_bias=True)
    check_against_truth(*layer_calls(), tensors, upstream, dtype)


def test_layer_norm_of_a_single_feature_is_its_bias():
    (x, weight, bias), upstream = make_inputs((5, 13, 1), with_bias=True)
    y, grad_x, grad_weight, grad_bias = results(layer_calls()[0], [x, weight, bias], upstream)
    assert torch.equal(y, bias.detach().expand(y.shape))
    # nothing but rounding of x, times one over the standard deviation
    assert max(largest(grad_x), largest(grad_weight)) <= 1e-14 * EPS**-0.5 * largest(x)
    torch.testing.assert_close(grad_bias, upstream.sum((0, 1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("present", [(False, False), (True, False), (False, True)])
def test_without_weight_or_bias(present, dtype):
    (x, *parameters), upstream = make_inputs((6, 100), with_bias=True)
    parameters = [p if given else None for p, given in zip(parameters, present, strict=True)]
    check_against_truth(*layer_calls(), [x, *parameters], upstream, dtype)
    for convention in CONVENTIONS:
        check_against_truth(*calls(convention), [x, parameters[0]], upstream, dtype)


@pytest.mark.parametrize("blocks", [(2**17, 64), (1, 64), (1, 5), (300, 1000)])
def test_blocks_do_not_show(blocks, monkeypatch):
    monkeypatch.setattr(eager, "CPU_BLOCK", blocks[0])
    monkeypatch.setattr(eager, "MAX_BLOCKS", blocks[1])
    tensors, upstream = make_inputs((31, 100))
    for dtype in (torch.float64, torch.bfloat16):
        check_against_truth(*calls("llama"), tensors, upstream, dtype)
    tensors, upstream = make_inputs((31, 100), with_bias=True)
    check_against_truth(*layer_calls(), tensors, upstream, torch.bfloat16)


def test_weight_gradient_of_many_16_bit_rows_is_summed_in_float32():
    tensors, upstream = make_inputs((3000, 64), with_bias=True)
    tensors, upstream = cast(tensors, torch.bfloat16), upstream.bfloat16()
    truth = results(layer_calls()[1], cast(tensors, torch.float64), upstream.double())
    for mine, true in zip(results(layer_calls()[0], tensors, upstream)[2:], truth[2:], strict=True):
        # one rounding to bf16, of each entry
        torch.testing.assert_close(mine.double(), true, rtol=2**-8, atol=1e-4)
    tensors = tensors[:2]
    truth = results(calls("gemma")[1], cast(tensors, torch.float64), upstream.double())[2]
    torch.testing.assert_close(results(calls("gemma")[0], tensors, upstream)[2].double(), truth, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("module_class", MODULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_models_class(module_class, dtype):
    (x, weight), upstream = make_inputs((2, 9, 100))
    module = module_class(100, eps=EPS).to(dtype)
    module.weight.data.copy_(weight)
    x, upstream = x.detach().to(dtype).requires_grad_(), upstream.to(dtype)
    options = CONVENTIONS[MODULES[module_class]]
    mine = results(lambda x, weight: rms_norm(x, weight, EPS, **options), [x, module.weight], upstream)
    theirs = results(lambda x, weight: module(x), [x, module.weight], upstream)
    truth = results(calls(MODULES[module_class])[1], cast([x, module.weight], torch.float64), upstream.double())
    # gemma3n takes pow(-0.5) instead of rsqrt
    assert module_class is Gemma3nRMSNorm or torch.equal(mine[0], theirs[0])
    assert_as_good_as(mine, theirs, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_models_class_without_weight(dtype):
    (x, _), upstream = make_inputs((2, 9, 100))
    (x,), upstream = cast([x], dtype), upstream.to(dtype)
    module = NanoChatRMSNorm(eps=EPS)
    mine = results(lambda x: rms_norm(x, None, EPS), [x], upstream)
    theirs = results(module, [x], upstream)
    assert torch.equal(mine[0], theirs[0])
    assert_as_good_as(mine, theirs, results(lambda x: rms_norm(x, None, EPS), cast([x], torch.float64), upstream))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_coheres_and_torchs_layer_norm(dtype, autocast):
    (x, weight, bias), upstream = make_inputs((2, 9, 100), with_bias=True)
    cohere, ours = CohereLayerNorm(100, eps=EPS).to(dtype), nn.LayerNorm(100, eps=EPS).to(dtype)
    for module in (cohere, ours):
        module.weight.data.copy_(weight)
    ours.bias.data.copy_(bias)
    x, upstream = x.detach().to(dtype).requires_grad_(), upstream.to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for module in (cohere, ours):
            parameters = [module.weight, getattr(module, "bias", None)]
            mine = results(lambda *tensors: layer_norm(*tensors, EPS), [x, *parameters], upstream)
            theirs = results(lambda x, *_, module=module: module(x), [x, *parameters], upstream)
            inputs = cast([x, *parameters], torch.float64)
            assert_as_good_as(mine, theirs, results(layer_calls()[1], inputs, upstream.double()))


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "bfloat16")])
@pytest.mark.parametrize("autocast", [False, True])
def test_mixed_dtypes_promote_as_torch_does(autocast, dtypes, convention):
    (x, weight), upstream = make_inputs((7, 63))
    operation, naive = calls(convention)
    tensors = [*cast([x], getattr(torch, dtypes[0])), *cast([weight], getattr(torch, dtypes[1]))]
    truth = results(naive, cast(tensors, torch.float64), upstream)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        mine, theirs = results(operation, tensors, upstream), results(naive, tensors, upstream)
    assert_as_good_as(mine, theirs, truth)


@pytest.mark.parametrize("width", [5, 64])
def test_gradcheck(width):
    tensors, _ = make_inputs((3, 2, width), with_bias=True)
    for operation in (*(calls(convention)[0] for convention in CONVENTIONS),):
        torch.autograd.gradcheck(operation, tensors[:2])
    torch.autograd.gradcheck(layer_calls()[0], tensors)


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_non_contiguous_inputs_and_expanded_gradients(dtype, name):
    (x, weight, bias), _ = make_inputs((20, 6, 40), with_bias=True)
    view = VIEWS[name]
    *_, width = shape = view(x).shape

    def on_view(function):
        return lambda x, *parameters: function(view(x), *(p[:width] for p in parameters))

    for upstream in (torch.ones((), dtype=torch.float64), torch.linspace(-1, 2, width, dtype=torch.float64)):
        for convention in ("llama", "gemma"):
            functions = map(on_view, calls(convention))
            check_against_truth(*functions, [x, weight], upstream.expand(shape), dtype)
        check_against_truth(*map(on_view, layer_calls()), [x, weight, bias], upstream.expand(shape), dtype)


@pytest.mark.parametrize("frozen", [(True, False, False), (False, True, True), (False, True, False), (False,) * 3])
def test_only_what_needs_a_gradient_gets_one(frozen):
    tensors, upstream = make_inputs((7, 100), with_bias=True)
    tensors = cast([t.detach().requires_grad_(not f) for t, f in zip(tensors, frozen, strict=True)], torch.bfloat16)
    for (operation, naive), inputs in ((calls("llama"), tensors[:2]), (layer_calls(), tensors)):
        check_against_truth(operation, naive, inputs, upstream, torch.bfloat16)
        output = operation(*inputs)
        edges = [edge for edge, _ in output.grad_fn.next_functions]
        assert [edge is None for edge in edges[: len(inputs)]] == list(frozen[: len(inputs)])


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_bytes(dtype, frozen):
    (x, weight, bias), _ = make_inputs((2, 9, 100), with_bias=True)
    x, weight, bias = cast([x, weight.requires_grad_(not frozen), bias.requires_grad_(not frozen)], dtype)
    rows = 2 * 9
    for convention in CONVENTIONS:
        norm = calls(convention)[0]
        assert saved_bytes(lambda norm=norm: norm(x, weight), weight) == rows * (100 * dtype.itemsize + 4)
    # the weight in another dtype is not kept a second time
    assert saved_bytes(lambda: rms_norm(x, weight.float(), EPS), weight) <= rows * (100 * dtype.itemsize + 4) + 400
    layer = saved_bytes(lambda: layer_norm(x, weight, bias, EPS), weight, bias)
    assert layer == rows * (100 * dtype.itemsize + 8)


def test_saves_less_than_the_models_class():
    (x, _), _ = make_inputs((2, 9, 100))
    (x,) = cast([x], torch.bfloat16)
    module = LlamaRMSNorm(100).bfloat16()
    lean = saved_bytes(lambda: rms_norm(x, module.weight, EPS), module.weight)
    # a float32 copy, the normalised row in bf16, and three numbers
    assert saved_bytes(lambda: module(x), module.weight) == 18 * (100 * (4 + 2) + 4)
    assert lean == 18 * (100 * 2 + 4)


def test_writes_into_nothing_it_was_given():
    tensors, upstream = make_inputs((7, 100), with_bias=True)
    for dtype in (torch.float32, torch.bfloat16):
        inputs, grad = cast(tensors, dtype), upstream.to(dtype)
        before = [t.detach().clone() for t in (*inputs, grad)]
        for (operation, _), used in ((calls("gemma"), inputs[:2]), (layer_calls(), inputs)):
            output = operation(*used)
            first = torch.autograd.grad(output, used, grad, retain_graph=True)
            # a second time from the same saved tensors
            second = torch.autograd.grad(output, used, grad)
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(before, (*inputs, grad), strict=True))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(use_reentrant):
    tensors, upstream = make_inputs((7, 100), with_bias=True)
    for (operation, _), inputs in ((calls("llama"), tensors[:2]), (layer_calls(), tensors)):
        plain = results(operation, inputs, upstream)
        again = results(
            lambda *t, operation=operation: checkpoint(operation, *t, use_reentrant=use_reentrant), inputs, upstream
        )
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_backward_under_autocast_is_that_without():
    tensors, upstream = make_inputs((40, 100), with_bias=True)
    inputs, upstream = cast(tensors, torch.float32), upstream.float()
    for (operation, _), used in ((calls("llama"), inputs[:2]), (layer_calls(), inputs)):
        expected = results(operation, used, upstream)
        with torch.autocast("cpu", torch.bfloat16):
            assert all(torch.equal(a, b) for a, b in zip(results(operation, used, upstream), expected, strict=True))


def test_fake_tensors():
    with FakeTensorMode():
        x = torch.empty(4, 33, 100, dtype=torch.bfloat16, requires_grad=True)
        weight, bias = (torch.empty(100, requires_grad=True) for _ in range(2))
        for y in (rms_norm(x, weight, EPS), layer_norm(x, weight, bias, EPS)):
            y.sum().backward()
        assert rms_norm(x, weight, EPS).dtype == torch.float32
        assert rms_norm(x, weight, EPS, cast_before_weight=False).dtype == torch.bfloat16
        assert x.grad.dtype == torch.bfloat16 and weight.grad.shape == bias.grad.shape == (100,)


def test_no_rows():
    (x, weight, bias), _ = make_inputs((0, 100), with_bias=True)
    for y in (rms_norm(x, weight, EPS), layer_norm(x, weight, bias, EPS)):
        assert y.shape == (0, 100)
        assert all(not gradient.any() for gradient in torch.autograd.grad(y.sum(), (x, weight)))


def test_second_derivative_is_refused():
    (x, weight), _ = make_inputs((3, 10))
    (gradient,) = torch.autograd.grad(rms_norm(x, weight, EPS).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(3, 10, dtype=torch.int64)}, "`x` must be floating point"),
        ({"x": torch.ones(())}, "`x` must be floating point"),
        ({"weight": torch.ones(9)}, r"`weight` must be .* \[10\].*`None`"),
        ({"weight": torch.ones(10, dtype=torch.int64)}, "int64"),
        ({"impl": "liger"}, "'liger'"),
        ({"impl": "triton"}, "triton"),
        ({"x": torch.ones(1, 20000), "weight": None, "impl": "triton"}, "20000.*auto"),
    ],
)
def test_errors_say_what_to_do(change, message):
    arguments = {"x": torch.ones(3, 10), "weight": torch.ones(10), "eps": EPS} | change
    with pytest.raises(ValueError, match=message):
        rms_norm(**arguments)
    with pytest.raises(ValueError, match=message):
        layer_norm(**arguments, bias=None)


def test_a_bias_that_does_not_fit():
    with pytest.raises(ValueError, match="`bias`"):
        layer_norm(torch.ones(3, 10), None, torch.ones(9), EPS)
