import itertools

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_tokenseek.memory import LiveMemory
from tokenseek_kernels.linear_cross_entropy import chunked, head_statistics, linear_cross_entropy, reference

DIM = 16
VARIANTS = {
    "plain": {},
    "scale": {"logit_scale": 0.25},
    "softcap": {"softcap": 3.0},
    "all": {"logit_scale": -1.7, "softcap": 5.0, "ignore_index": -1},
}


def make_inputs(rows, vocabulary=101, dtype=torch.float32, bias=False, ignore_index=-100, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, DIM, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, DIM, generator=generator, dtype=torch.float64)
    offset = torch.randn(vocabulary, generator=generator, dtype=torch.float64) if bias else None
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    # rows 2, 6, 10, ... are ignored; the first rows reach both ends of the vocabulary
    targets[2::4] = ignore_index
    targets[:1] = vocabulary - 1
    targets[1:2] = 0
    upstream = torch.randn(rows, generator=generator, dtype=torch.float64)
    leaves = [None if t is None else t.to(dtype).requires_grad_() for t in (hidden, weight, offset)]
    return *leaves, targets, upstream


def dense_pytorch(hidden, weight, bias, targets, logit_scale=1.0, softcap=None, ignore_index=-100):
    """What a Hugging Face model does, in the dtype of its inputs."""
    logits = F.linear(hidden, weight, bias) * logit_scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="none")


def loss_and_gradients(function, leaves, upstream):
    leaves = [leaf for leaf in leaves if leaf is not None]
    loss = function()
    return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream.to(loss.dtype))]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk_rows", [1, 5, 1000, None])
@pytest.mark.parametrize(("rows", "vocabulary"), list(itertools.product([1, 7, 63], [101, 257])))
def test_equals_dense_and_reference(rows, vocabulary, chunk_rows, bias, variant):
    options = VARIANTS[variant]
    inputs = make_inputs(rows, vocabulary, torch.float64, bias, options.get("ignore_index", -100))
    hidden, weight, offset, targets, upstream = inputs
    calls = [
        lambda: linear_cross_entropy(hidden, weight, targets, bias=offset, chunk_rows=chunk_rows, **options),
        lambda: linear_cross_entropy(hidden, weight, targets, bias=offset, impl="reference", **options),
        lambda: dense_pytorch(hidden, weight, offset, targets, **options),
    ]
    ours, naive, dense = (loss_and_gradients(call, (hidden, weight, offset), upstream) for call in calls)
    torch.testing.assert_close(ours, naive)
    torch.testing.assert_close(ours, dense)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(variant):
    options = VARIANTS[variant]
    hidden, weight, bias, targets, _ = make_inputs(7, 11, torch.float64, True, options.get("ignore_index", -100))

    def function(hidden, weight, bias):
        return linear_cross_entropy(hidden, weight, targets, bias=bias, chunk_rows=2, **options)

    assert torch.autograd.gradcheck(function, (hidden, weight, bias))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_that_of_dense_pytorch_in_the_same_dtype(dtype, variant):
    # the largest error against float64 <= twice dense PyTorch's (sums in another order) + a few roundings of the scale
    options = VARIANTS[variant]
    *leaves, targets, upstream = make_inputs(63, 257, dtype, True, options.get("ignore_index", -100))
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    hidden, weight, bias = leaves
    ours = loss_and_gradients(
        lambda: linear_cross_entropy(hidden, weight, targets, bias=bias, chunk_rows=5, **options), leaves, upstream
    )
    same_dtype = loss_and_gradients(lambda: dense_pytorch(*leaves, targets, **options), leaves, upstream)
    truth = loss_and_gradients(lambda: dense_pytorch(*exact, targets, **options), exact, upstream)
    for name, mine, theirs, true in zip(("loss", "hidden", "weight", "bias"), ours, same_dtype, truth, strict=True):
        mine_error, their_error = ((value.double() - true).abs().max() for value in (mine, theirs))
        excess = (mine_error - 2 * their_error) / true.abs().max()
        assert excess <= 4 * torch.finfo(dtype).eps, f"{name}: {excess:.2e} of the largest value"


@pytest.mark.parametrize("chunk_rows", [1, 4, None])
def test_all_ignored(chunk_rows):
    hidden, weight, bias, targets, upstream = make_inputs(7, bias=True)
    targets = torch.full_like(targets, -100)
    results = loss_and_gradients(
        lambda: linear_cross_entropy(hidden, weight, targets, bias=bias, chunk_rows=chunk_rows),
        (hidden, weight, bias),
        upstream,
    )
    assert all(not value.any() for value in results)


@pytest.mark.parametrize("chunk_rows", [3, None])
def test_no_rows_stays_connected(chunk_rows):
    hidden, weight, bias, targets, _ = make_inputs(0, bias=True)
    loss = linear_cross_entropy(hidden, weight, targets, bias=bias, chunk_rows=chunk_rows)
    assert loss.shape == (0,)
    loss.sum().backward()
    assert hidden.grad.shape == (0, DIM)
    assert not weight.grad.any() and not bias.grad.any()
    statistics = head_statistics(hidden, weight, targets, bias=bias, chunk_rows=chunk_rows)
    assert [value.shape for value in statistics] == [(0,)] * 3


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}])
def test_poisoned_rows_without_gradient_leave_no_trace(poison, options):
    hidden, weight, bias, targets, upstream = make_inputs(63, bias=True)
    upstream[5] = 0.0
    clean = loss_and_gradients(
        lambda: linear_cross_entropy(hidden, weight, targets, bias=bias, chunk_rows=4, **options),
        (hidden, weight, bias),
        upstream,
    )
    dirty = hidden.detach().clone()
    dirty[[2, 5]] = poison
    dirty.requires_grad_()
    poisoned = loss_and_gradients(
        lambda: linear_cross_entropy(dirty, weight, targets, bias=bias, chunk_rows=4, **options),
        (dirty, weight, bias),
        upstream,
    )
    assert poisoned[0][2] == 0
    assert torch.equal(poisoned[0][6:], clean[0][6:])
    assert not poisoned[1][[2, 5]].any()
    for mine, expected in zip(poisoned[1:], clean[1:], strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=0)


def test_upstream_gradient_of_an_ignored_row_is_not_read():
    hidden, weight, _, targets, upstream = make_inputs(7)
    upstream[2] = float("nan")
    loss = linear_cross_entropy(hidden, weight, targets)
    assert all(value.isfinite().all() for value in torch.autograd.grad(loss, (hidden, weight), upstream.float()))


def test_expanded_upstream_gradient():
    hidden, weight, _, targets, _ = make_inputs(63)
    summed = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets).sum(), (hidden, weight))
    loss = linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(summed, torch.autograd.grad(loss, (hidden, weight), torch.ones(63)))


def test_non_contiguous_inputs():
    hidden, weight, _, targets, upstream = make_inputs(7)
    transposed = hidden.detach().T.contiguous().T.requires_grad_()
    strided = torch.cat([weight.detach(), weight.detach()], 1)[:, :DIM].requires_grad_()
    expected = loss_and_gradients(lambda: linear_cross_entropy(hidden, weight, targets), (hidden, weight), upstream)
    actual = loss_and_gradients(
        lambda: linear_cross_entropy(transposed, strided, targets), (transposed, strided), upstream
    )
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("wanted", [c for n in (1, 2, 3) for c in itertools.combinations(range(3), n)])
def test_only_wanted_gradients_are_made(wanted, monkeypatch):
    hidden, weight, bias, targets, upstream = make_inputs(7, bias=True)
    leaves = [hidden, weight, bias]
    expected = torch.autograd.grad(dense_pytorch(*leaves, targets), leaves, upstream.float())
    made = []
    original = chunked.backward
    monkeypatch.setattr(chunked, "backward", lambda *args: made.append(original(*args)) or made[-1])
    for index, leaf in enumerate(leaves):
        leaf.requires_grad_(index in wanted)
    linear_cross_entropy(hidden, weight, targets, bias=bias, chunk_rows=2).backward(upstream.float())
    for index, leaf in enumerate(leaves):
        if index in wanted:
            torch.testing.assert_close(leaf.grad, expected[index])
        else:
            assert leaf.grad is None and made[0][index] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_bytes_equal_the_formula(dtype):
    rows = 63
    hidden, weight, bias, targets, _ = make_inputs(rows, 257, dtype, bias=True)
    parameters = {weight.data_ptr(), bias.data_ptr()}
    saved = {}

    def pack(tensor):
        if tensor.data_ptr() not in parameters:
            saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = linear_cross_entropy(hidden, weight, targets, bias=bias)
    assert loss.dtype == torch.float32
    assert sum(saved.values()) == rows * (DIM * dtype.itemsize + 8 + 4)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_one_chunk_of_logits_is_alive(softcap):
    rows, vocabulary, chunk_rows = 64, 2**14, 8
    options = (None, 1.0, softcap, -100, chunk_rows, "torch")
    chunk = chunk_rows * vocabulary * 4
    # what belongs to rows (scalars and hidden states, each rounded up to 512 bytes)
    small = 16 * rows * DIM * 4
    with FakeTensorMode(), torch.no_grad():
        hidden = torch.empty(rows, DIM, dtype=torch.bfloat16)
        weight = torch.empty(vocabulary, DIM, dtype=torch.bfloat16)
        targets = torch.zeros(rows, dtype=torch.int64)
        with LiveMemory(hidden, weight, targets) as memory:
            _, log_sum_exp = chunked.forward(hidden, weight, targets, *options)
        assert memory.peak_bytes - memory.base_bytes <= 1.5 * chunk + small
        with LiveMemory(hidden, weight, targets) as memory:
            needs = (True, True, False)
            chunked.backward(torch.ones(rows), hidden, weight, targets, log_sum_exp, *options, needs)
        slope = 0 if softcap is None else chunk
        assert memory.peak_bytes - memory.base_bytes <= 1.5 * chunk + slope + weight.nbytes + small
        with LiveMemory(hidden, weight, targets) as memory:
            chunked.head_statistics(hidden, weight, targets, *options)
        assert memory.peak_bytes - memory.base_bytes <= 2 * chunk + slope + small


def test_fake_tensors():
    with FakeTensorMode():
        hidden = torch.empty(63, DIM, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(257, DIM, dtype=torch.bfloat16, requires_grad=True)
        targets = torch.zeros(63, dtype=torch.int64)
        loss = linear_cross_entropy(hidden, weight, targets, softcap=3.0)
        loss.sum().backward()
        assert loss.shape == (63,) and loss.dtype == torch.float32
        assert hidden.grad.shape == hidden.shape and weight.grad.dtype == torch.bfloat16
        assert head_statistics(hidden, weight, targets).entropy.shape == (63,)


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(bias, contiguous):
    hidden, weight, offset, targets, upstream = make_inputs(7, bias=bias)
    hidden, weight = hidden.detach(), weight.detach()
    if not contiguous:
        hidden = hidden.T.contiguous().T
    offset = offset.detach() if bias else None
    options = (0.5, 3.0, -100, 2, "torch")
    ops = torch.ops.tokenseek
    torch.library.opcheck(ops.linear_cross_entropy_forward, (hidden, weight, targets, offset, *options))
    _, log_sum_exp = ops.linear_cross_entropy_forward(hidden, weight, targets, offset, *options)
    arguments = (upstream.float(), hidden, weight, targets, log_sum_exp, offset, *options)
    for needs in ((True, True, bias), (True, False, False), (False, True, False)):
        torch.library.opcheck(ops.linear_cross_entropy_backward, (*arguments, *needs))
    torch.library.opcheck(ops.head_statistics, (hidden, weight, targets, offset, *options))


def test_autocast_runs_in_its_dtype_and_keeps_no_copy_of_the_weight():
    hidden, weight, bias, targets, upstream = make_inputs(63, 257, bias=True)
    saved = []
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        loss = linear_cross_entropy(hidden, weight, targets, bias=bias, chunk_rows=5)
        statistics = head_statistics(hidden, weight, targets, bias=bias, chunk_rows=5)
    gradients = torch.autograd.grad(loss, (hidden, weight, bias), upstream.float())
    assert loss.dtype == torch.float32 and all(gradient.dtype == torch.float32 for gradient in gradients)
    assert any(tensor is weight for tensor in saved)
    assert not any(tensor.shape == weight.shape and tensor.dtype == torch.bfloat16 for tensor in saved)
    with torch.autocast("cpu", torch.bfloat16):
        expected = dense_pytorch(hidden, weight, bias, targets)
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0.05)
    torch.testing.assert_close(statistics.loss, loss)
    for mine, theirs in zip(
        gradients, torch.autograd.grad(expected, (hidden, weight, bias), upstream.float()), strict=True
    ):
        assert F.cosine_similarity(mine.flatten(), theirs.flatten(), dim=0) > 0.999


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("chunk_rows", [1, 5, None])
@pytest.mark.parametrize("bias", [False, True])
def test_head_statistics(bias, chunk_rows, variant):
    options = VARIANTS[variant]
    inputs = make_inputs(63, 101, torch.float64, bias, options.get("ignore_index", -100))
    hidden, weight, offset, targets, _ = inputs
    statistics = head_statistics(hidden, weight, targets, bias=offset, chunk_rows=chunk_rows, **options)
    naive = head_statistics(hidden, weight, targets, bias=offset, impl="reference", **options)
    torch.testing.assert_close(tuple(statistics), tuple(naive))

    loss = dense_pytorch(hidden, weight, offset, targets, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), hidden)
    torch.testing.assert_close(statistics.loss, loss)
    torch.testing.assert_close(statistics.gradient_norm, gradient.norm(dim=1))
    logits = reference.dense_logits(hidden, weight, offset, options.get("logit_scale", 1.0), options.get("softcap"))
    torch.testing.assert_close(statistics.entropy, torch.distributions.Categorical(logits=logits).entropy())
    assert not any(value.requires_grad for value in statistics)


def test_second_backward_is_refused():
    hidden, weight, _, targets, _ = make_inputs(7)
    loss = linear_cross_entropy(hidden, weight, targets).square().sum()
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("function", [linear_cross_entropy, head_statistics])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"impl": "triton"}, "triton"),
        ({"hidden": torch.zeros(2, 7, DIM)}, "Flatten"),
        ({"hidden": torch.zeros(7, DIM + 1)}, "V, D"),
        ({"hidden": torch.zeros(7, DIM, dtype=torch.bfloat16)}, "one dtype"),
        ({"targets": torch.zeros(7, dtype=torch.int32)}, "int32"),
        ({"targets": torch.zeros(6, dtype=torch.int64)}, r"\[6\]"),
        ({"bias": torch.zeros(DIM)}, "`bias`"),
        ({"softcap": 0.0}, "`softcap`"),
        ({"chunk_rows": 0}, "`chunk_rows`"),
    ],
)
def test_errors_name_the_value(function, change, message):
    hidden, weight, _, targets, _ = make_inputs(7)
    arguments = {"hidden": hidden, "weight": weight, "targets": targets} | change
    with pytest.raises(ValueError, match=message):
        function(**arguments)
