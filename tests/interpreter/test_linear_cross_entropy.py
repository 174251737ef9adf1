"""The Triton kernels of linear cross entropy against the dense reference, and beside the kernels of trl and Liger."""

import itertools

import pytest
import torch

from tokenseek_kernels.linear_cross_entropy import chunked, head_statistics, linear_cross_entropy
from tokenseek_kernels.linear_cross_entropy import triton as kernels

DIM = 16
VARIANTS = {
    "plain": {},
    "scale": {"logit_scale": 0.25},
    "softcap": {"softcap": 3.0},
    "all": {"logit_scale": -1.7, "softcap": 5.0, "ignore_index": -1},
}
# rows, vocabulary, rows of a chunk: one of everything, several chunks, and several blocks of both kernels
SHAPES = [(1, 1, None), (1, 37, None), (7, 37, 3), (6, 500, 1), (5, 2000, 2), (4, 4500, 3)]
# An error may be twice that of plain torch in the same dtype, plus the rounding of the largest value (float32: plus
# that of tanh, which the kernels take from a sigmoid).
ROUNDING = {torch.float32: 5e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float64: 1e-13}


def make_inputs(device, rows, vocabulary, dtype=torch.float32, bias=True, ignore_index=-100, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, DIM, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, DIM, generator=generator, dtype=torch.float64)
    offset = torch.randn(vocabulary, generator=generator, dtype=torch.float64) if bias else None
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    # rows 2 and 6 are ignored; the first rows reach both ends of the vocabulary
    targets[2::4] = ignore_index
    targets[:1] = vocabulary - 1
    targets[1:2] = 0
    upstream = torch.randn(rows, generator=generator, dtype=torch.float64).to(device)
    leaves = [None if t is None else t.to(device, dtype).requires_grad_() for t in (hidden, weight, offset)]
    return *leaves, targets.to(device), upstream


def loss_and_gradients(leaves, targets, upstream, **options):
    hidden, weight, bias = leaves
    loss = linear_cross_entropy(hidden, weight, targets, bias=bias, **options)
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, wanted, upstream.to(loss.dtype))]


def in_float64(leaves):
    return [None if leaf is None else leaf.detach().double().requires_grad_() for leaf in leaves]


def assert_as_exact_as_torch(names, kernel, plain, truth, dtype):
    for name, mine, theirs, true in zip(names, kernel, plain, truth, strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        error, allowed = ((value.double() - true).abs().max().item() for value in (mine, theirs))
        limit = 2 * allowed + ROUNDING[dtype] * true.abs().max().item()
        # `not <=`: a NaN is a failure
        assert error <= limit, f"{name}: {error:.2e}, allowed are {limit:.2e}"


def assert_loss_and_gradients(leaves, targets, upstream, dtype, **options):
    chunk_rows = options.pop("chunk_rows", None)
    kernel, plain = (
        loss_and_gradients(leaves, targets, upstream, impl=impl, chunk_rows=chunk_rows, **options)
        for impl in ("triton", "torch")
    )
    truth = loss_and_gradients(in_float64(leaves), targets, upstream, impl="reference", **options)
    assert_as_exact_as_torch(("loss", "hidden", "weight", "bias")[: len(truth)], kernel, plain, truth, dtype)


def assert_statistics(leaves, targets, dtype, **options):
    chunk_rows = options.pop("chunk_rows", None)
    exact = in_float64(leaves)
    kernel, plain = (
        head_statistics(*leaves[:2], targets, bias=leaves[2], chunk_rows=chunk_rows, impl=impl, **options)
        for impl in ("triton", "torch")
    )
    truth = head_statistics(*exact[:2], targets, bias=exact[2], impl="reference", **options)
    assert_as_exact_as_torch(kernel._fields, kernel, plain, truth, dtype)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "vocabulary", "chunk_rows"), SHAPES)
def test_loss_and_gradients(device, rows, vocabulary, chunk_rows, dtype, bias, variant):
    options = VARIANTS[variant]
    inputs = make_inputs(device, rows, vocabulary, dtype, bias, options.get("ignore_index", -100))
    *leaves, targets, upstream = inputs
    assert_loss_and_gradients(leaves, targets, upstream, dtype, chunk_rows=chunk_rows, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes(device, dtype):
    *leaves, targets, upstream = make_inputs(device, 5, 1100, dtype)
    assert_loss_and_gradients(leaves, targets, upstream, dtype, chunk_rows=2, logit_scale=0.7, softcap=4.0)
    assert_statistics(leaves, targets, dtype, chunk_rows=2, logit_scale=0.7, softcap=4.0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "vocabulary", "chunk_rows"), SHAPES)
def test_head_statistics(device, rows, vocabulary, chunk_rows, dtype, bias, variant):
    options = VARIANTS[variant]
    inputs = make_inputs(device, rows, vocabulary, dtype, bias, options.get("ignore_index", -100))
    *leaves, targets, _ = inputs
    assert_statistics(leaves, targets, dtype, chunk_rows=chunk_rows, **options)


def test_a_vocabulary_of_262145_classes(device):
    *leaves, targets, upstream = make_inputs(device, 1, 2**18 + 1, torch.bfloat16, bias=False)
    assert_loss_and_gradients(leaves, targets, upstream, torch.bfloat16)


@pytest.mark.parametrize("factor", [1.0, -3.0])
def test_expanded_upstream_gradient(device, factor):
    *leaves, targets, _ = make_inputs(device, 7, 37)
    upstream = torch.tensor(factor, device=device).expand(7)
    kernel = loss_and_gradients(leaves, targets, upstream, impl="triton", chunk_rows=3)
    dense = loss_and_gradients(leaves, targets, upstream, impl="reference")
    torch.testing.assert_close(kernel, dense)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(device, variant):
    options = VARIANTS[variant]
    ignore_index = options.get("ignore_index", -100)
    hidden, weight, bias, targets, _ = make_inputs(device, 3, 4, torch.float64, ignore_index=ignore_index)
    hidden, weight = (leaf.detach()[:, :2].clone().requires_grad_() for leaf in (hidden, weight))

    def function(hidden, weight, bias):
        return linear_cross_entropy(hidden, weight, targets, bias=bias, chunk_rows=2, impl="triton", **options)

    assert torch.autograd.gradcheck(function, (hidden, weight, bias))


@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(device, bias):
    hidden, weight, offset, targets, upstream = make_inputs(device, 3, 37, bias=bias)
    inputs = hidden.detach().T.contiguous().T, weight.detach(), targets
    offset = offset.detach() if bias else None
    options = (0.5, 3.0, -100, 2, "triton")
    ops = torch.ops.tokenseek
    torch.library.opcheck(ops.head_statistics, (*inputs, offset, *options))
    torch.library.opcheck(ops.linear_cross_entropy_forward, (*inputs, offset, *options))
    _, log_sum_exp = ops.linear_cross_entropy_forward(*inputs, offset, *options)
    arguments = (upstream.float(), *inputs, log_sum_exp, offset, *options)
    for needs in ((True, True, bias), (True, False, False)):
        torch.library.opcheck(ops.linear_cross_entropy_backward, (*arguments, *needs))


def test_all_rows_ignored(device):
    *leaves, targets, upstream = make_inputs(device, 5, 37)
    targets.fill_(-100)
    results = loss_and_gradients(leaves, targets, upstream, impl="triton", chunk_rows=2)
    assert all(not value.any() for value in results)
    statistics = head_statistics(*leaves[:2], targets, bias=leaves[2], impl="triton")
    assert not statistics.loss.any() and not statistics.gradient_norm.any()
    assert statistics.entropy.min() > 0


@pytest.mark.parametrize("ignore_index", [0, 36])
def test_the_ignored_target_may_be_a_class(device, ignore_index):
    *leaves, targets, upstream = make_inputs(device, 7, 37, ignore_index=ignore_index)
    options = {"ignore_index": ignore_index}
    kernel = loss_and_gradients(leaves, targets, upstream, impl="triton", chunk_rows=3, **options)
    dense = loss_and_gradients(leaves, targets, upstream, impl="reference", **options)
    torch.testing.assert_close(kernel, dense)


def test_no_rows_stay_connected(device):
    hidden, weight, bias, targets, _ = make_inputs(device, 0, 37)
    linear_cross_entropy(hidden, weight, targets, bias=bias, impl="triton").sum().backward()
    assert hidden.grad.shape == (0, DIM) and not weight.grad.any() and not bias.grad.any()
    assert [value.shape for value in head_statistics(hidden, weight, targets, impl="triton")] == [(0,)] * 3


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_poisoned_rows_without_gradient_leave_no_trace(device, softcap, poison):
    options = {"impl": "triton", "chunk_rows": 3, "softcap": softcap}
    hidden, weight, bias, targets, upstream = make_inputs(device, 7, 37)
    upstream[5] = 0.0
    clean = loss_and_gradients((hidden, weight, bias), targets, upstream, **options)
    dirty = hidden.detach().clone()
    dirty[[2, 5]] = poison
    poisoned = loss_and_gradients((dirty.requires_grad_(), weight, bias), targets, upstream, **options)
    assert poisoned[0][2] == 0
    assert not poisoned[1][[2, 5]].any()
    for mine, expected in zip(poisoned[1:], clean[1:], strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=0)


def test_upstream_gradient_of_an_ignored_row_is_not_read(device):
    *leaves, targets, upstream = make_inputs(device, 7, 37)
    upstream[2] = float("nan")
    results = loss_and_gradients(leaves, targets, upstream, impl="triton")
    assert all(value.isfinite().all() for value in results)


def test_a_live_row_that_is_nan_has_a_nan_loss(device):
    hidden, weight, _, targets, _ = make_inputs(device, 3, 1100)
    with torch.no_grad():
        hidden[1, 3] = float("nan")
        statistics = head_statistics(hidden, weight, targets, impl="triton")
    assert statistics.loss.isnan().tolist() == statistics.entropy.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("target", [37, 2**32, -7])
def test_a_target_that_is_no_class_has_a_nan_loss(device, target):
    hidden, weight, _, targets, _ = make_inputs(device, 3, 37)
    targets[1] = target
    loss = linear_cross_entropy(hidden, weight, targets, impl="triton")
    assert loss.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("forbidden", [float("-inf"), torch.finfo(torch.float32).min])
def test_forbidden_classes(device, forbidden):
    # whole blocks of them, and the first one too
    *leaves, targets, upstream = make_inputs(device, 2, 4500)
    with torch.no_grad():
        leaves[2][1:4400] = forbidden
    kernel = loss_and_gradients(leaves, targets, upstream, impl="triton")
    dense = loss_and_gradients(leaves, targets, upstream, impl="reference")
    torch.testing.assert_close(kernel, dense)
    kernel, dense = (head_statistics(*leaves[:2], targets, bias=leaves[2], impl=i) for i in ("triton", "torch"))
    torch.testing.assert_close(tuple(kernel), tuple(dense))


def test_logits_far_from_zero(device):
    # a shift of all logits changes neither loss nor entropy; the weight's first column is the shift
    hidden, weight, _, targets, _ = make_inputs(device, 5, 1100, torch.float64, bias=False)
    with torch.no_grad():
        weight[:, 0] = 1.0
        plain = head_statistics(hidden, weight, targets, impl="triton")
        hidden[:, 0] += 1e6
        shifted = head_statistics(hidden, weight, targets, impl="triton")
    torch.testing.assert_close(tuple(shifted)[:2], tuple(plain)[:2], rtol=1e-7, atol=1e-7)


def test_nothing_outside_of_the_chunk_is_touched(device):
    rows, vocabulary, guard = 3, 1100, 4096
    *_, bias, targets, _ = make_inputs(device, rows, vocabulary, ignore_index=0)
    around = torch.full((2 * guard + rows * vocabulary,), float("nan"), device=device)
    logits = around[guard:-guard].view(rows, vocabulary)
    logits.copy_(torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0)))
    padded_bias = torch.full((2 * guard + vocabulary,), float("nan"), device=device)
    padded_bias[guard:-guard] = bias.detach()
    bias = padded_bias[guard:-guard]
    expected = torch.nn.functional.cross_entropy(logits + bias, targets, reduction="none")
    gradient = (logits + bias).softmax(1) - torch.nn.functional.one_hot(targets, vocabulary)

    loss, log_sum_exp, entropy = kernels._launch_loss(logits, bias, targets, 1.0, None, entropy=True)
    kernels._launch_gradient(logits, bias, targets, 0, log_sum_exp, torch.ones_like(loss), 1.0, None)
    torch.testing.assert_close(loss, expected)
    assert entropy.isfinite().all()
    torch.testing.assert_close(logits, gradient)
    assert around[:guard].isnan().all() and around[-guard:].isnan().all()


def test_non_contiguous_inputs(device):
    hidden, weight, bias, targets, upstream = make_inputs(device, 7, 37)
    expected = loss_and_gradients((hidden, weight, bias), targets, upstream, impl="triton", chunk_rows=3)
    strided = (
        hidden.detach().T.contiguous().T,
        torch.cat([weight.detach(), weight.detach()], 1)[:, :DIM],
        bias.detach().repeat_interleave(2)[::2],
    )
    strided = [leaf.requires_grad_() for leaf in strided]
    targets, upstream = targets.repeat_interleave(2)[::2], upstream.repeat_interleave(2)[::2]
    actual = loss_and_gradients(strided, targets, upstream, impl="triton", chunk_rows=3)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("wanted", [c for n in (1, 2, 3) for c in itertools.combinations(range(3), n)])
def test_only_wanted_gradients_are_made(device, wanted, monkeypatch):
    *leaves, targets, upstream = make_inputs(device, 3, 37)
    expected = loss_and_gradients(leaves, targets, upstream, impl="triton")[1:]
    made = []
    original = chunked.backward
    monkeypatch.setattr(chunked, "backward", lambda *args: made.append(original(*args)) or made[-1])
    for index, leaf in enumerate(leaves):
        leaf.requires_grad_(index in wanted)
    actual = loss_and_gradients(leaves, targets, upstream, impl="triton")[1:]
    assert [index for index in range(3) if made[0][index] is not None] == list(wanted)
    torch.testing.assert_close(actual, [expected[index] for index in wanted])


def test_autocast(device):
    *leaves, targets, upstream = make_inputs(device, 7, 37)
    with torch.autocast(device, torch.bfloat16):
        kernel, plain = (
            (
                loss_and_gradients(leaves, targets, upstream, impl=impl, chunk_rows=3),
                tuple(head_statistics(*leaves[:2], targets, bias=leaves[2], impl=impl)),
            )
            for impl in ("triton", "torch")
        )
    assert all(value.dtype == torch.float32 for part in kernel for value in part)
    torch.testing.assert_close(kernel, plain, rtol=2**-8, atol=2**-8)


def test_two_runs_agree_to_the_bit(device):
    *leaves, targets, upstream = make_inputs(device, 7, 2100, torch.bfloat16)
    first, second = (loss_and_gradients(leaves, targets, upstream, impl="triton", softcap=3.0) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"logit_scale": -1.7, "softcap": 5.0}])
def test_trl_agrees(device, options):
    trl = pytest.importorskip("trl.kernels.chunked_logprob", reason="trl is not installed, or has no such kernel")
    *leaves, targets, upstream = make_inputs(device, 5, 2100, ignore_index=0)
    mine = loss_and_gradients(leaves, targets, upstream, impl="triton", chunk_rows=2, **options)
    statistics = head_statistics(*leaves[:2], targets, bias=leaves[2], impl="triton", **options)

    scale, softcap = options.get("logit_scale", 1.0), options.get("softcap")
    log_probs, entropy, *_ = trl.ChunkedLogProbFunction.apply(*leaves, targets, 1.0, 600, softcap, scale, ("entropy",))
    theirs = torch.autograd.grad(-log_probs, leaves, upstream.float())
    torch.testing.assert_close(mine, [-log_probs.detach(), *theirs], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(statistics.entropy, entropy.detach(), rtol=1e-5, atol=1e-5)


def test_liger_agrees(device):
    # without bias and softcap, which Liger's kernel cannot do in the interpreter
    liger = pytest.importorskip("liger_kernel.ops.fused_linear_cross_entropy", reason="liger-kernel is not installed")
    hidden, weight, _, targets, upstream = make_inputs(device, 5, 500, bias=False)
    mine = loss_and_gradients((hidden, weight, None), targets, upstream, impl="triton", chunk_rows=2)
    function = liger.LigerFusedLinearCrossEntropyFunction
    loss, *_ = function.apply(hidden, weight, targets, None, None, -100, 0.0, 0.0, "none")
    theirs = torch.autograd.grad(loss, (hidden, weight), upstream.float())
    torch.testing.assert_close(mine, [loss.detach(), *theirs], rtol=1e-5, atol=1e-5)
