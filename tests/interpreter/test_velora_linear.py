"""The Triton kernels that compress."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.kernels.lean_checks import CONVENTIONS, assert_as_good_as, cast, largest, results, saved_bytes
from tokenseek_kernels import compress, gated_activation, gated_activation_compress, rms_norm, rms_norm_compress
from tokenseek_kernels.compilation import TARGETS
from tokenseek_kernels.lean_mlp.activations import TORCH
from tokenseek_kernels.velora_linear import operators, triton

EPS = 1e-6
# width, size and rank; none of the sizes but 1 and the widths themselves divides its width
SHAPES = [(48, 1, 3), (7, 3, 1), (63, 7, 2), (100, 18, 1), (100, 48, 3), (250, 100, 2), (100, 100, 1), (1, 1, 1)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def make_inputs(width, rank, device, shape=(2, 3), dtype=torch.float64):
    """x, another such tensor, weight and an upstream gradient, in `dtype`, and directions in float32 or float64."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(device)

    tensors = normal(*shape, width), normal(*shape, width), normal(width)
    directions = normal(rank, width).to(torch.promote_types(dtype, torch.float32))
    return cast([t.requires_grad_() for t in tensors], dtype), normal(*shape, width).to(dtype), directions


def compressed_alike(states, z, directions, size, dtype=None):
    """z is that of `states` in `dtype`, as good as the reference in that dtype finds it."""
    states = states.detach().to(dtype or states.dtype)
    truth = compress(states.double(), directions.double(), size, impl="reference")
    assert_as_good_as([z], [compress(states, directions, size, impl="reference")], [truth])
    assert not z.requires_grad


def same_results(found, expected):
    """Equal but for the order of float32 sums, which may turn the rounding of a 16-bit result."""
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
        rounding = {torch.float64: 1e-13, torch.float32: 1e-6}.get(mine.dtype, torch.finfo(mine.dtype).eps)
        assert largest((mine - theirs).double()) <= 2 * rounding * largest(theirs)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_compress(dtype, shape, device):
    width, size, rank = shape
    (x, *_), _, directions = make_inputs(width, rank, device, dtype=dtype)
    z = compress(x, directions, size, impl="triton")
    assert z.shape == (2, 3, -(-width // size) * rank)
    compressed_alike(x, z, directions, size)


@pytest.mark.parametrize("size", [1000, 8192])
def test_compress_long_sub_tokens(size, device):
    (x, *_), _, directions = make_inputs(9000, 2, device, (2,), torch.bfloat16)
    compressed_alike(x, compress(x, directions, size, impl="triton"), directions, size)


def test_sub_tokens_that_are_too_long_go_to_torch(device):
    (x, other, _), _, directions = make_inputs(8193, 1, device, (2,))
    calls = (
        lambda impl: compress(x, directions, 8193, impl=impl),
        lambda impl: gated_activation_compress(x, other, "silu", directions, 8193, impl=impl)[1],
        lambda impl: rms_norm_compress(x, None, EPS, directions, 8193, impl=impl)[1],
    )
    for call in calls:
        with pytest.raises(ValueError, match="8192 features"):
            call("triton")
        # to rounding: a GPU's products may add up in another order the next time
        torch.testing.assert_close(call("auto"), call("torch"), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("shape", [(48, 1, 3), (63, 7, 2), (100, 48, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_compress(dtype, shape, convention, device):
    width, size, rank = shape
    (x, _, weight), upstream, directions = make_inputs(width, rank, device, dtype=dtype)
    check_norm(x, weight, upstream, directions, size, CONVENTIONS[convention])


def check_norm(x, weight, upstream, directions, size, options):
    """y and its gradients against rms_norm, z against the reference on that y."""
    compressed = []

    def fused(x, weight):
        y, z = rms_norm_compress(x, weight, EPS, directions, size, impl="triton", **options)
        compressed.append(z)
        return y

    found = results(fused, [x, weight], upstream)
    plain = results(lambda x, weight: rms_norm(x, weight, EPS, impl="triton", **options), [x, weight], upstream)
    same_results(found, plain)
    compressed_alike(found[0], compressed[0], directions, size)


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "float32")])
@pytest.mark.parametrize("convention", ["llama", "gemma"])
def test_mixed_dtypes_and_no_weight(convention, dtypes, device):
    (x, _, weight), upstream, directions = make_inputs(63, 1, device)
    (x,), (weight,) = cast([x], getattr(torch, dtypes[0])), cast([weight], getattr(torch, dtypes[1]))
    check_norm(x, weight, upstream, directions.float(), 18, CONVENTIONS[convention])
    check_norm(x, None, upstream, directions.float(), 18, CONVENTIONS[convention])


def test_a_row_that_padding_makes_too_long_takes_two_kernels(device):
    width, size = 4300, 33
    assert triton.row_elements(width, size) > 8192
    (x, _, weight), upstream, directions = make_inputs(width, 1, device, (2,), torch.bfloat16)
    check_norm(x, weight, upstream, directions, size, {})


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", TORCH)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_activation_compress(dtype, activation, gated, device):
    (gate, up, _), upstream, directions = make_inputs(100, 2, device, dtype=dtype)
    for size in (7, 48):
        check_activation(gate, up if gated else None, activation, upstream, directions, size)


def check_activation(gate, up, activation, upstream, directions, size):
    """The product and its gradients against gated_activation, z against the reference on that product."""
    compressed = []

    def fused(gate, up):
        product, z = gated_activation_compress(gate, up, activation, directions, size, impl="triton")
        compressed.append(z)
        return product

    found = results(fused, [gate, up], upstream)
    plain = results(lambda gate, up: gated_activation(gate, up, activation, impl="triton"), [gate, up], upstream)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, plain, strict=True))
    compressed_alike(found[0], compressed[0], directions, size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_compresses_what_the_layers_read(dtype, device):
    (x, up, weight), _, directions = make_inputs(63, 2, device, dtype=dtype)
    with torch.autocast(device, torch.bfloat16):
        y, z = rms_norm_compress(x, weight.float(), EPS, directions, 18, impl="triton")
        product, z_product = gated_activation_compress(x, up, "silu", directions, 18, impl="triton")
    assert (y.dtype, product.dtype) == (torch.float32, dtype)
    for states, found in ((y, z), (product, z_product)):
        compressed_alike(states, found, directions, 18, torch.bfloat16)


@pytest.mark.parametrize("operation", ["compress", "norm", "activation"])
def test_views_are_read_inside_of_their_bounds(operation, device):
    """What lies between and around the rows of a view is NaN, and nothing of it shows."""
    (x, other, weight), upstream, directions = make_inputs(10, 2, device, (6,))
    buffer = torch.full((8, 40), float("nan"), dtype=torch.float64, device=device)
    buffer[1:7, 5:15], buffer[1:7, 20:30] = x.detach(), other.detach()
    views = [buffer[1:7, 5:15].requires_grad_(), buffer[1:7, 20:30].requires_grad_()]
    wide = torch.full((2, 20), float("nan"), dtype=torch.float64, device=device)
    wide[:, ::2] = directions

    def run(x, other, upstream, directions):
        if operation == "compress":
            return [compress(x, directions, 3, impl="triton")]
        doors = {
            "norm": lambda x, _: rms_norm_compress(x, weight, EPS, directions, 3, impl="triton"),
            "activation": lambda x, other: gated_activation_compress(x, other, "gelu", directions, 3, impl="triton"),
        }
        z = doors[operation](x, other)[1]
        return [
            z,
            *results(lambda *t: doors[operation](*t)[0], [x, other if operation == "activation" else None], upstream),
        ]

    found = run(*views, upstream[:1].expand(6, 10), wide[:, ::2])
    expected = run(x, other, upstream[:1].expand(6, 10).contiguous(), directions)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
    assert buffer.isnan().sum() == 8 * 40 - 120


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saves_what_the_plain_operations_save(dtype, frozen, device):
    (x, up, weight), _, directions = make_inputs(100, 2, device, dtype=dtype)
    weight.requires_grad_(not frozen)
    norm = saved_bytes(lambda: rms_norm_compress(x, weight, EPS, directions, 18, impl="triton")[0], weight)
    assert norm == 6 * (100 * dtype.itemsize + 4)
    for other, tensors in ((up, 2), (None, 1)):
        found = saved_bytes(
            lambda other=other: gated_activation_compress(x, other, "silu", directions, 18, impl="triton")[0]
        )
        assert found == tensors * 6 * 100 * dtype.itemsize


def test_second_derivative_is_refused(device):
    (x, up, weight), _, directions = make_inputs(5, 1, device)
    for output in (
        rms_norm_compress(x, weight, EPS, directions, 2, impl="triton")[0],
        gated_activation_compress(x, up, "silu", directions, 2, impl="triton")[0],
    ):
        (gradient,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


def test_writes_into_nothing_it_was_given_and_is_deterministic(device):
    tensors, upstream, directions = make_inputs(100, 2, device, dtype=torch.float32)
    x, up, weight = tensors
    given = [*tensors, upstream, directions]
    before = [t.detach().clone() for t in given]

    def everything():
        y, z = rms_norm_compress(x, weight, EPS, directions, 18, impl="triton")
        product, z_product = gated_activation_compress(x, up, "silu", directions, 18, impl="triton")
        gradients = torch.autograd.grad((y, product), (x, up, weight), (upstream, upstream))
        return [y, z, product, z_product, *gradients, compress(x, directions, 18, impl="triton")]

    assert all(torch.equal(a, b) for a, b in zip(everything(), everything(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, given, strict=True))


def test_opcheck(device):
    (x, up, weight), _, directions = make_inputs(33, 2, device, dtype=torch.bfloat16)
    x, up, weight = (t.detach() for t in (x, up, weight))
    ops = torch.ops.tokenseek
    torch.library.opcheck(ops.compress, (x, directions, 7))
    for scale, dtype in ((weight, torch.bfloat16), (None, torch.float32)):
        arguments = (x, scale, EPS, 1.0, False, dtype, directions, 7, torch.bfloat16)
        torch.library.opcheck(ops.rms_norm_compress, arguments)
    for other in (up, None):
        torch.library.opcheck(ops.gated_activation_compress, (x, other, "silu", directions, 7, torch.float32))


def test_fake_tensors(device):
    with FakeTensorMode():
        x, up = (torch.empty(4, 33, 100, device=device, requires_grad=True) for _ in range(2))
        weight, directions = torch.empty(100, device=device, requires_grad=True), torch.empty(2, 100, device=device)
        for output, z in (
            rms_norm_compress(x, weight, EPS, directions, 18, impl="triton"),
            gated_activation_compress(x, up, "silu", directions, 18, impl="triton"),
            gated_activation_compress(x, None, "silu", directions, 18, impl="triton"),
        ):
            assert output.shape == x.shape and z.shape == (4, 33, 12) and not z.requires_grad
            output.sum().backward()
        assert compress(x, directions, 18, impl="triton").shape == (4, 33, 12)
        assert x.grad.shape == up.grad.shape == (4, 33, 100) and weight.grad.shape == (100,)


def test_no_rows(device):
    (x, up, weight), _, directions = make_inputs(10, 2, device, (0,))
    for y, z in (
        rms_norm_compress(x, weight, EPS, directions, 3, impl="triton"),
        gated_activation_compress(x, up, "silu", directions, 3, impl="triton"),
    ):
        assert y.shape == (0, 10) and z.shape == (0, 8)
    assert operators.compress(x.detach(), directions, 3).shape == (0, 8)


def test_every_tile_a_launch_takes_is_compiled():
    for target in TARGETS.values():
        listed = {
            (c.kernel, c.constants["FEATURES"], c.constants["GROUPS"], c.num_warps)
            for c in triton.compilations(target)
        }
        for size in range(1, 8193, 37):
            for kernel in (triton._compress_kernel, triton._gated_activation_compress_kernel):
                assert (kernel, *triton.tile(size, target)) in listed
            for width in range(size, 8193, 1000):
                if triton.row_elements(width, size) <= 8192:
                    assert (triton._rms_norm_compress_kernel, *triton.row_tile(width, size, target)) in listed


def test_every_activation_is_compiled():
    for target in TARGETS.values():
        listed = {
            (c.constants["ACTIVATION"], "p_up" not in c.constants)
            for c in triton.compilations(target)
            if c.kernel is triton._gated_activation_compress_kernel
        }
        assert listed == {(name, gated) for name in TORCH for gated in (True, False)}
