import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from tests.kernels.lean_checks import VIEWS, assert_as_good_as, cast, results, saved_bytes
from tokenseek_kernels import (
    compress,
    compressed_linear,
    expand,
    gated_activation,
    gated_activation_compress,
    rms_norm,
    rms_norm_compress,
)

OUT = 11
# width, size and rank: sizes that divide their width and that do not, up to the whole width, and of one feature
SHAPES = [(48, 16, 1), (48, 16, 3), (50, 16, 2), (63, 7, 1), (7, 3, 2), (100, 100, 2), (20, 1, 1), (1, 1, 1)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
IMPLEMENTATIONS = ["torch", "reference"]
EPS = 1e-6


def naive_compress(x, directions, size):
    """Sub-token by sub-token."""
    starts = range(0, x.shape[-1], size)
    return torch.cat([x[..., a : a + size] @ directions[:, a : a + size].T.to(x.dtype) for a in starts], -1)


def naive_expand(z, directions, size):
    rank, width = directions.shape
    parts = zip(z.split(rank, -1), range(0, width, size), strict=True)
    return torch.cat([part @ directions[:, a : a + size].to(z.dtype) for part, a in parts], -1)


def naive_linear(x, weight, bias, directions, expansion, size):
    """The input rebuilt in full where the weight gradient needs one; everything else is the plain layer's."""
    rebuilt = naive_expand(naive_compress(x.detach(), directions, size), expansion, size)
    through_rebuilt = F.linear(rebuilt, weight)
    return F.linear(x, weight.detach(), bias) + (through_rebuilt - through_rebuilt.detach())


def projected_linear(x, weight, bias, directions, expansion, size, impl="torch"):
    z = compress(x, directions, size, impl=impl)
    return compressed_linear(x, z, weight, bias, expansion, size)


def orthonormal(width, size, rank, generator):
    """Random directions, orthonormal within each group; a group shorter than the rank has zeros for the rest."""
    directions = torch.zeros(rank, width, dtype=torch.float64)
    for start in range(0, width, size):
        features = min(size, width - start)
        basis, _ = torch.linalg.qr(torch.randn(features, rank, generator=generator, dtype=torch.float64))
        directions[: basis.shape[1], start : start + features] = basis.T
    return directions


def make_inputs(width, size, rank, shape=(3, 7), seed=0):
    """x, weight, bias; an upstream gradient; directions. All float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes):
        return torch.randn(sizes, generator=generator, dtype=torch.float64)

    tensors = [t.requires_grad_() for t in (normal(*shape, width), normal(OUT, width), normal(OUT))]
    return tensors, normal(*shape, OUT), orthonormal(width, size, rank, generator)


def wide(directions, dtype):
    """As the doors take them: float64 for float64 inputs, else float32."""
    return directions.to(torch.promote_types(dtype, torch.float32))


def plain_results(tensors, upstream):
    """Output and gradients of torch's own layer."""
    return results(F.linear, tensors, upstream)


def matrix_of(directions, size):
    """P, of which x P are the compressed rows."""
    return naive_compress(torch.eye(directions.shape[1], dtype=directions.dtype), directions, size)


# compress and expand


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_compress_equals_the_formula(dtype, shape, impl):
    (x, *_), _, directions = make_inputs(*shape)
    (x,), directions = cast([x], dtype), wide(directions, dtype)
    z, size = compress(x, directions, shape[1], impl=impl), shape[1]
    # a product and a sum of its own, in the dtype of x, err by this much
    plain = (x.detach().unsqueeze(-2) * directions.to(dtype)).split(size, -1)
    plain = torch.stack([part.sum(-1) for part in plain], -2).flatten(-2)
    assert_as_good_as([z], [plain], [naive_compress(x.detach().double(), directions.double(), size)])
    assert not z.requires_grad


@pytest.mark.parametrize("shape", SHAPES)
def test_expand_equals_the_formula(shape):
    (x, *_), _, directions = make_inputs(*shape)
    z = naive_compress(x.detach(), directions, shape[1])
    torch.testing.assert_close(expand(z, directions, shape[1]), naive_expand(z, directions, shape[1]))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_compressing_and_expanding_is_an_orthogonal_projection(shape, impl):
    (x, *_), _, directions = make_inputs(*shape)
    size, x = shape[1], x.detach()

    def project(x):
        return expand(compress(x, directions, size, impl=impl), directions, size)

    projection, rebuilt = project(torch.eye(shape[0], dtype=torch.float64)), project(x)
    close = {"rtol": 0, "atol": 1e-13}
    torch.testing.assert_close(projection, projection.T, **close)
    torch.testing.assert_close(projection @ projection, projection, **close)
    residual = compress(x - rebuilt, directions, size, impl=impl)
    torch.testing.assert_close(residual, torch.zeros_like(residual), **close)
    assert (rebuilt.norm(dim=-1) <= x.norm(dim=-1) * (1 + 1e-13)).all()


def test_random_directions_times_their_size_rebuild_without_bias():
    size, draws = 6, 20_000
    generator = torch.Generator().manual_seed(1)
    token = torch.randn(size, generator=generator, dtype=torch.float64)
    # every group is a draw
    directions = orthonormal(size * draws, size, 1, generator)
    z = compress(token.repeat(draws), directions, size, impl="reference")
    rebuilt = expand(z, size * directions, size).view(draws, size)
    spread = rebuilt.std(0) / draws**0.5
    assert ((rebuilt.mean(0) - token).abs() <= 5 * spread).all()
    errors = (rebuilt - token).square().sum(1)
    assert abs(errors.mean() - (size - 1) * token.square().sum()) <= 5 * errors.std() / draws**0.5


@pytest.mark.parametrize("size", [4, 16, 64, 128])
def test_of_rows_without_a_direction_one_in_size_of_the_energy_is_kept(size):
    rows, width = 2000, 512
    (x, *_), _, directions = make_inputs(width, size, 1, (rows,))
    kept = compress(x, directions, size).square().mean() / size
    # the mean of n squares of normal numbers is 1 with a standard deviation of sqrt(2 / n)
    assert abs(kept - 1 / size) <= 5 / size * (2 * size / (rows * width)) ** 0.5


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_large_values_do_not_overflow_in_16_bits(impl):
    x = torch.zeros(2, 64).index_fill_(1, torch.tensor([0, 17, 33, 50]), 3e38).bfloat16()
    # two values whose sum fits after their products with the direction
    x[:, 34] = -3e38
    directions = wide(make_inputs(64, 16, 2)[2], torch.bfloat16)
    z = compress(x, directions, 16, impl=impl)
    assert naive_compress(x.float(), directions, 16).isfinite().all() and z.isfinite().all()
    assert z.abs().max() > 1e37


# the layer


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("rows", [(21,), (3, 7), (2, 3, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_output_and_exact_gradients_are_those_of_a_linear_layer_bit_for_bit(dtype, rows, with_bias):
    (x, weight, bias), upstream, directions = make_inputs(50, 16, 2, rows)
    tensors, upstream = cast([x, weight, bias if with_bias else None], dtype), upstream.to(dtype)
    directions = wide(directions, dtype)
    found = results(lambda *t: projected_linear(*t, directions, directions, 16), tensors, upstream)
    expected = plain_results(tensors, upstream)
    names = ("output", "x", "weight", "bias")
    for name, mine, theirs in zip(names, found, expected, strict=False):
        assert torch.equal(mine, theirs) == (name != "weight"), name


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_gradient_equals_the_one_from_the_rebuilt_input(dtype, shape, impl):
    tensors, upstream, directions = make_inputs(*shape)
    check_layer(cast(tensors, dtype), upstream.to(dtype), wide(directions, dtype), shape[1], impl)


def check_layer(tensors, upstream, directions, size, impl="torch"):
    """With directions other than those of the expansion, as an unbiased projection has."""
    expansion = 1.7 * directions
    dtype = tensors[1].dtype

    def naive(x, weight, bias):
        return naive_linear(x.to(dtype), weight, bias, directions.to(x.dtype), expansion.to(dtype), size)

    exactly = [t.double() for t in (directions, expansion)]
    truth = results(lambda *t: naive_linear(*t, *exactly, size), cast(tensors, torch.float64), upstream.double())
    found = results(lambda *t: projected_linear(*t, directions, expansion, size, impl), tensors, upstream)
    assert_as_good_as(found, results(naive, tensors, upstream), truth)


@pytest.mark.parametrize("shape", SHAPES)
def test_weight_gradient_is_a_projection_of_the_exact_one(shape):
    tensors, upstream, directions = make_inputs(*shape)
    found = results(lambda *t: projected_linear(*t, directions, directions, shape[1]), tensors, upstream)[2]
    exact = plain_results(tensors, upstream)[2]
    matrix = matrix_of(directions, shape[1])
    torch.testing.assert_close(found, exact @ matrix @ matrix.T, rtol=0, atol=1e-12)
    # so it points downhill
    torch.testing.assert_close((found * exact).sum(), found.square().sum(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_inputs_along_the_directions_have_an_exact_weight_gradient(shape):
    (x, *parameters), upstream, directions = make_inputs(*shape)
    x = naive_expand(naive_compress(x.detach(), directions, shape[1]), directions, shape[1]).requires_grad_()
    tensors = [x, *parameters]
    found = results(lambda *t: projected_linear(*t, directions, directions, shape[1]), tensors, upstream)
    for mine, exact in zip(found, plain_results(tensors, upstream), strict=True):
        torch.testing.assert_close(mine, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sub_tokens_of_one_feature_are_exact_bit_for_bit(dtype, impl):
    tensors, upstream, _ = make_inputs(40, 1, 1)
    tensors, ones = cast(tensors, dtype), wide(torch.ones(1, 40), dtype)
    found = results(lambda *t: projected_linear(*t, ones, ones, 1, impl), tensors, upstream.to(dtype))
    expected = plain_results(tensors, upstream)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "float32")])
def test_x_in_another_dtype(dtypes):
    (x, *parameters), upstream, directions = make_inputs(50, 16, 2)
    tensors = [*cast([x], getattr(torch, dtypes[0])), *cast(parameters, getattr(torch, dtypes[1]))]
    check_layer(tensors, upstream, directions.float(), 16)


@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "float32"), ("float32", "bfloat16")])
def test_autocast(dtypes):
    (x, *parameters), upstream, directions = make_inputs(50, 16, 2)
    tensors = [*cast([x], getattr(torch, dtypes[0])), *cast(parameters, getattr(torch, dtypes[1]))]
    directions = directions.float()
    truth = results(
        lambda *t: naive_linear(*t, directions.double(), directions.double(), 16),
        cast(tensors, torch.float64),
        upstream,
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert compress(tensors[0], directions, 16).dtype == torch.bfloat16
        found = results(lambda *t: projected_linear(*t, directions, directions, 16), tensors, upstream)
        plain = results(lambda *t: naive_linear(*t, directions, directions, 16), tensors, upstream)
        linear = plain_results(tensors, upstream)
    assert_as_good_as(found, plain, truth)
    assert all(torch.equal(found[i], linear[i]) for i in (0, 1, 3))


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_non_contiguous_inputs_and_expanded_gradients(dtype, name):
    generator = torch.Generator().manual_seed(0)
    x = VIEWS[name](torch.randn(20, 6, 40, generator=generator, dtype=torch.float64).to(dtype))
    width = x.shape[-1]
    (_, weight, bias), *_ = make_inputs(width, 16, 2)
    directions = wide(orthonormal(width, 16, 2, generator), dtype)
    tensors = [x.requires_grad_(), *cast([weight, bias], dtype)]
    for upstream in (torch.ones((), dtype=dtype), torch.linspace(-1, 2, OUT, dtype=dtype)):
        check_layer(tensors, upstream.expand(*x.shape[:-1], OUT), directions, 16)


@pytest.mark.parametrize("shape", [(48, 16, 1), (50, 16, 3), (63, 7, 2)])
def test_carrier_gets_the_compressed_gradient(shape):
    (x, weight, bias), upstream, directions = make_inputs(*shape)
    z = compress(x, directions, shape[1])
    carrier = torch.full((OUT, z.shape[-1]), float("nan"), dtype=torch.float64).requires_grad_()
    output = compressed_linear(x, z, weight, bias, directions, shape[1], carrier=carrier)
    output.backward(upstream)
    torch.testing.assert_close(carrier.grad, upstream.flatten(0, 1).T @ z.flatten(0, 1))
    torch.testing.assert_close(weight.grad, naive_expand(carrier.grad, directions, shape[1]))
    # so that a clipped norm of compressed gradients is the norm of the gradients
    torch.testing.assert_close(carrier.grad.norm(), weight.grad.norm())


def test_a_frozen_weight_leaves_the_carrier_and_the_exact_gradients():
    (x, weight, bias), upstream, directions = make_inputs(50, 16, 2)
    z, expected = compress(x, directions, 16), plain_results([x, weight, bias], upstream)
    weight.requires_grad_(False)
    carrier = torch.zeros(OUT, z.shape[-1], dtype=torch.float64).requires_grad_()
    for given in (carrier, None):
        compressed_linear(x, z, weight, bias, directions, 16, carrier=given).backward(upstream)
        assert torch.equal(x.grad, expected[1]) and torch.equal(bias.grad, expected[3]) and weight.grad is None
        x.grad = bias.grad = None
    torch.testing.assert_close(carrier.grad, upstream.flatten(0, 1).T @ z.flatten(0, 1))


@pytest.mark.parametrize("trained", ["weight", "carrier", "nothing"])
def test_observer_gets_the_compressed_and_the_exact_gradient(trained):
    (x, weight, bias), upstream, directions = make_inputs(50, 16, 2)
    exact = plain_results([x, weight, bias], upstream)[2]
    weight.requires_grad_(trained == "weight")
    z, seen = compress(x, directions, 16), []
    carrier = torch.zeros(OUT, z.shape[-1], dtype=torch.float64).requires_grad_(trained == "carrier")
    output = compressed_linear(
        x, z, weight, bias, directions, 16, carrier=carrier, observe=lambda *gradients: seen.append(gradients)
    )
    output.backward(upstream)
    if trained == "nothing":
        assert not seen
        return
    ((compressed, true),) = seen
    assert torch.equal(true, exact)
    matrix = matrix_of(directions, 16)
    torch.testing.assert_close(compressed, exact @ matrix @ matrix.T)


def test_gradcheck():
    (x, weight, bias), _, directions = make_inputs(7, 3, 2, (2, 3))
    z = compress(x, directions, 3)
    torch.autograd.gradcheck(lambda x, b: compressed_linear(x, z, weight.detach(), b, directions, 3), (x, bias))


@pytest.mark.parametrize("kept", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)])
def test_only_what_needs_a_gradient_gets_one(kept):
    tensors, upstream, directions = make_inputs(50, 16, 2)
    tensors = [t.detach().requires_grad_(bool(k)) for t, k in zip(tensors, kept, strict=True)]
    check_layer(tensors, upstream, directions, 16)


def test_rows_in_any_order_and_any_batch_add_up_to_one_weight_gradient():
    (x, weight, _), upstream, directions = make_inputs(50, 16, 2, (24,))
    directions = directions.float()
    (x, weight), upstream = cast([x, weight], torch.float32), upstream.float()

    def weight_gradient(rows):
        step = results(
            lambda x, w: projected_linear(x, w, None, directions, directions, 16),
            [x[rows].detach(), weight],
            upstream[rows],
        )
        return step[1]

    whole = weight_gradient(slice(None))
    close = {"rtol": 0, "atol": 1e-6 * whole.norm().item()}
    torch.testing.assert_close(
        weight_gradient(torch.randperm(24, generator=torch.Generator().manual_seed(0))), whole, **close
    )
    parts = sum(weight_gradient(slice(start, start + 5)) for start in range(0, 24, 5))
    torch.testing.assert_close(parts, whole, **close)


# memory


@pytest.mark.parametrize("shape", [(48, 16, 1), (50, 16, 3), (100, 100, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_bytes(dtype, shape):
    width, size, rank = shape
    tensors, _, directions = make_inputs(*shape)
    (x, weight, bias), directions = cast(tensors, dtype), wide(directions, dtype)
    rows, columns = 21, -(-width // size) * rank
    found = saved_bytes(lambda: projected_linear(x, weight, bias, directions, directions, size), weight, directions)
    assert found == rows * columns * dtype.itemsize
    assert saved_bytes(lambda: F.linear(x, weight, bias), weight) == rows * width * dtype.itemsize


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_layers_with_one_input_save_one_compressed_input(impl):
    (x, weight, _), _, directions = make_inputs(50, 16, 2)
    weights = [weight, *(weight.detach().clone().requires_grad_() for _ in range(2))]
    rows, columns = 21, 8

    def three(compressible):
        z = compress(x, directions, 16, impl=impl)
        layers = [lambda w: compressed_linear(x, z, w, None, directions, 16)] * compressible
        layers += [lambda w: F.linear(x, w)] * (3 - compressible)
        return sum(layer(w) for layer, w in zip(layers, weights, strict=True))

    def saved(compressible):
        return saved_bytes(lambda: three(compressible), *weights, directions)

    assert saved(0) == rows * 50 * 8
    # a single layer that keeps x makes the compressed input an extra
    assert saved(1) == saved(2) == rows * (50 + columns) * 8
    assert saved(3) == rows * columns * 8


def test_what_a_frozen_or_observed_layer_saves():
    (x, weight, bias), _, directions = make_inputs(50, 16, 2)
    z = compress(x, directions, 16)

    def saved(**options):
        return saved_bytes(
            lambda: compressed_linear(x, z, weight, bias, directions, 16, **options), weight, directions
        )

    assert saved(observe=lambda *_: None) == 21 * (50 + 8) * 8
    weight.requires_grad_(False)
    assert saved() == saved(observe=lambda *_: None) == 0
    carrier = torch.zeros(OUT, 8, dtype=torch.float64).requires_grad_()
    assert saved(carrier=carrier) == 21 * 8 * 8


# the doors that make the input as well


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", [{}, {"offset": 1.0, "cast_before_weight": False}])
@pytest.mark.parametrize("dtypes", [("float64", "float64"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")])
def test_rms_norm_compress(dtypes, options, impl):
    (x, *_), _, directions = make_inputs(50, 16, 2)
    (x,), (weight,) = cast([x], getattr(torch, dtypes[0])), cast([x[0, 0]], getattr(torch, dtypes[1]))
    weight.requires_grad_()
    directions, upstream = wide(directions, x.dtype), torch.linspace(-1, 2, 50).expand(3, 7, 50)
    y, z = rms_norm_compress(x, weight, EPS, directions, 16, impl=impl, **options)
    assert torch.equal(z, compress(y, directions, 16, impl=impl)) and not z.requires_grad
    found = results(
        lambda *t: rms_norm_compress(*t, EPS, directions, 16, impl=impl, **options)[0], [x, weight], upstream
    )
    expected = results(lambda *t: rms_norm(*t, EPS, impl=impl, **options), [x, weight], upstream)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gated_activation_compress(dtype, gated, impl):
    (gate, *_), _, directions = make_inputs(50, 16, 2)
    gate, up = cast([gate, gate.flip(-1)], dtype)
    up = up.requires_grad_() if gated else None
    directions, upstream = wide(directions, dtype), torch.linspace(-1, 2, 50).expand(3, 7, 50)
    product, z = gated_activation_compress(gate, up, "silu", directions, 16, impl=impl)
    assert torch.equal(z, compress(product, directions, 16, impl=impl)) and not z.requires_grad
    found = results(
        lambda *t: gated_activation_compress(*t, "silu", directions, 16, impl=impl)[0], [gate, up], upstream
    )

    def plain(gate, up):
        return F.silu(gate) if up is None else F.silu(gate) * up

    truth = results(plain, cast([gate, up], torch.float64), upstream)
    assert_as_good_as(found, results(plain, [gate, up], upstream), truth)
    alone = results(lambda *t: gated_activation(*t, "silu", impl=impl), [gate, up], upstream)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, alone, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_doors_save_what_the_plain_operations_save(dtype):
    (x, *_), _, directions = make_inputs(50, 16, 2)
    x, up, weight = cast([x, x.flip(-1), x[0, 0]], dtype)
    up, weight, directions = up.requires_grad_(), weight.requires_grad_(), directions.float()
    norm = saved_bytes(lambda: rms_norm_compress(x, weight, EPS, directions, 16)[0], weight)
    assert norm == 21 * (50 * dtype.itemsize + 4)
    for other, tensors in ((up, 2), (None, 1)):
        found = saved_bytes(lambda other=other: gated_activation_compress(x, other, "silu", directions, 16)[0])
        assert found == tensors * 21 * 50 * dtype.itemsize


# the rest


def test_writes_into_nothing_it_was_given():
    tensors, upstream, directions = make_inputs(50, 16, 2)
    given = [*tensors, upstream, directions]
    before = [t.detach().clone() for t in given]
    output = projected_linear(*tensors, directions, directions, 16)
    first = torch.autograd.grad(output, tensors, upstream, retain_graph=True)
    second = torch.autograd.grad(output, tensors, upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, given, strict=True))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(use_reentrant):
    tensors, upstream, directions = make_inputs(50, 16, 2)

    def layer(*tensors):
        return projected_linear(*tensors, directions, directions, 16)

    again = results(lambda *t: checkpoint(layer, *t, use_reentrant=use_reentrant), tensors, upstream)
    assert all(torch.equal(a, b) for a, b in zip(results(layer, tensors, upstream), again, strict=True))


def test_fake_tensors():
    with FakeTensorMode():
        x, up = (torch.empty(4, 33, 50, requires_grad=True) for _ in range(2))
        weight, scale = torch.empty(OUT, 50, requires_grad=True), torch.empty(50, requires_grad=True)
        directions = torch.empty(2, 50)
        for states, z in (
            (x, compress(x, directions, 16)),
            rms_norm_compress(x, scale, EPS, directions, 16),
            gated_activation_compress(x, up, "silu", directions, 16),
        ):
            assert z.shape == (4, 33, 8)
            compressed_linear(states, z, weight, None, directions, 16).sum().backward()
        assert x.grad.shape == up.grad.shape == (4, 33, 50)
        assert weight.grad.shape == (OUT, 50) and scale.grad.shape == (50,)


def test_no_rows():
    (x, weight, bias), _, directions = make_inputs(50, 16, 2, (0, 5))
    output = projected_linear(x, weight, bias, directions, directions, 16)
    assert output.shape == (0, 5, OUT)
    assert all(not gradient.any() for gradient in torch.autograd.grad(output.sum(), (x, weight, bias)))


def test_second_derivative_is_refused():
    (x, weight, _), _, directions = make_inputs(50, 16, 2)
    output = projected_linear(x, weight, None, directions, directions, 16).square().sum()
    (gradient,) = torch.autograd.grad(output, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(3, 9)}, r"\[3, 9\] and \[2, 10\]"),
        ({"x": torch.ones(())}, r"`x`.*\[..., width\]"),
        ({"directions": torch.ones(10)}, r"\[rank, width\]"),
        ({"size": 0}, r"`size` must be in \[1, 10\].*got 0"),
        ({"size": 11}, "got 11"),
        ({"impl": "liger"}, "'liger'"),
        ({"impl": "triton"}, "triton"),
    ],
)
def test_errors_say_what_to_do(change, message):
    arguments = {"x": torch.ones(3, 10), "directions": torch.ones(2, 10), "size": 4} | change
    x, rest = arguments["x"], {name: value for name, value in arguments.items() if name != "x"}
    for call in (
        lambda: compress(**arguments),
        lambda: rms_norm_compress(x, None, EPS, **rest),
        lambda: gated_activation_compress(x, None, "silu", **rest),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_triton_says_which_sub_tokens_are_too_long():
    with pytest.raises(ValueError, match="up to 8192 features, got 9000.*auto"):
        compress(torch.ones(1, 9000), torch.ones(1, 9000), 9000, impl="triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": torch.ones(3, 5)}, r"`z` \[..., 6\].*\[3, 5\]"),
        ({"z": torch.ones(2, 6)}, r"`z`.*\[2, 6\]"),
        ({"weight": torch.ones(5, 9)}, r"`weight`.*\[5, 9\]"),
        ({"weight": torch.ones(10)}, "`weight`"),
        ({"expansion": torch.ones(2, 9)}, r"\[2, 9\]"),
        ({"size": 12}, "`size`"),
        ({"carrier": torch.ones(5, 5)}, r"`carrier` must have shape \[5, 6\], got \[5, 5\]"),
    ],
)
def test_errors_of_the_layer_say_what_does_not_fit(change, message):
    arguments = {
        "x": torch.ones(3, 10),
        "z": torch.ones(3, 6),
        "weight": torch.ones(5, 10),
        "bias": None,
        "expansion": torch.ones(2, 10),
        "size": 4,
    }
    with pytest.raises(ValueError, match=message):
        compressed_linear(**arguments | change)
