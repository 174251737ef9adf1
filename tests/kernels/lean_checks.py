"""What the tests of the lean operations share: saved bytes, and errors measured against a float64 truth."""

import torch

# rounding of the result itself, relative to the largest entry: a few units of float32, one of the 16-bit types
ROUNDING = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# options of rms_norm, by the model whose class they follow
CONVENTIONS = {
    "llama": {},
    "olmo2": {"cast_before_weight": False},
    "gemma": {"offset": 1.0, "cast_before_weight": False},
    "offset before the cast": {"offset": 1.0},
}
# of a tensor with at least four rows and 23 features
VIEWS = {
    "transposed": lambda x: x.transpose(0, 1),
    "slice": lambda x: x[:, :, 3:23],
    "every other feature": lambda x: x[:, :, ::2],
    "expanded": lambda x: x[:1].expand(4, *x.shape[1:]),
}


def saved_bytes(function, *left_out):
    """Bytes of the unique storages that `function()` saves for backward, without those of `left_out`."""
    parameters = {tensor.untyped_storage().data_ptr() for tensor in left_out if tensor is not None}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function()
    assert output.requires_grad
    return sum(saved.values())


def results(function, tensors, upstream):
    """Output of `function(*tensors)` and the gradients of those tensors that want one, in their order."""
    leaves = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
    output = function(*tensors)
    if leaves:
        # not autograd.grad, which reentrant checkpointing refuses
        output.backward(upstream.to(output.dtype))
    gradients = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return [output.detach(), *gradients]


def cast(tensors, dtype):
    """Copies in `dtype`, leaves with the same wish for a gradient."""
    return [None if t is None else t.detach().to(dtype, copy=True).requires_grad_(t.requires_grad) for t in tensors]


def assert_as_good_as(found, plain, truth):
    """
    Each result of `found` has shape and dtype of its counterpart in `plain`, and is as near to the float64 `truth`: at
    most twice the error of `plain` and one rounding.
    """
    for mine, theirs, true in zip(found, plain, truth, strict=True):
        assert mine.shape == theirs.shape == true.shape
        assert mine.dtype == theirs.dtype
        allowed = 2 * largest(theirs.double() - true) + ROUNDING[mine.dtype] * largest(true)
        assert largest(mine.double() - true) <= allowed


def largest(tensor):
    return tensor.abs().max().item() if tensor.numel() else 0.0
