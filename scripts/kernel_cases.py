"""What the kernels' benchmark compares: each operation at a model's shapes, beside other ways to the same result."""

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import tokenseek_kernels as kernels

EVIDENCE_QUERIES = 64  # default of SeekConfig
COMPRESSED_GROUPS = 32  # default of VeloraConfig
BLOCK = 64  # default of LemoConfig


class Shape(NamedTuple):
    """Sizes of a model."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    dim: int
    vocabulary: int


LLAMA = (
    Shape("Llama-3.2-1B", 2048, 8192, 32, 8, 64, 128_256),
    Shape("Llama-3-8B", 4096, 14_336, 32, 8, 128, 128_256),
)


class Contender(NamedTuple):
    """
    One way to compute something.

    Attributes:
        name (`str`): as the table says it.
        run (`Callable`): the forward pass.
        inputs (`Sequence[Tensor]`): what the backward pass differentiates; empty if there is none.
        comparable (`Callable`, *optional*): what of its output every contender has; `None` where results are random.
    """

    name: str
    run: Callable[[], Tensor]
    inputs: Sequence[Tensor] = ()
    comparable: Callable[[Tensor], Tensor] | None = lambda output: output


class Sizes(NamedTuple):
    """
    Where a case runs.

    Attributes:
        shape ([`Shape`]): the model.
        tokens (`int`): tokens of the one sequence.
        rows (`int`): selected ones.
        device (`str`), dtype (`torch.dtype`): of its tensors.
    """

    shape: Shape
    tokens: int
    rows: int
    device: str
    dtype: torch.dtype

    def random(self, *size: int, grad: bool = False) -> Tensor:
        return torch.randn(size, device=self.device, dtype=self.dtype).requires_grad_(grad)

    def selected(self) -> Tensor:
        """`(1, rows)`: distinct, ascending."""
        return torch.randperm(self.tokens, device=self.device)[: self.rows].sort().values[None]


def selected_attention(sizes: Sizes) -> list[Contender]:
    """The rows that the pass with gradients runs; the dense row is what plain training runs for the same layer."""
    shape, n, rows = sizes.shape, sizes.tokens, sizes.selected()
    states = [(heads, sizes.random(1, heads, n, shape.dim)) for heads in (shape.heads, shape.kv_heads, shape.kv_heads)]
    fresh = [s.gather(2, rows[:, None, :, None].expand(1, h, -1, shape.dim)).requires_grad_() for h, s in states]
    query, (key, value) = fresh[0], (s.clone() for _, s in states[1:])
    whole = [state.clone().requires_grad_() for _, state in states]
    masked = [query, *whole[1:]]
    seen = torch.arange(n, device=sizes.device) <= rows[0, :, None]

    def ours(impl: str) -> Callable[[], Tensor]:
        return lambda: kernels.selected_attention(*fresh, key, value, rows, impl=impl)

    def with_a_mask() -> Tensor:
        # its fused form with a mask takes no grouped heads: models repeat them
        group = shape.heads // shape.kv_heads
        repeated = (state.repeat_interleave(group, dim=1) for state in masked[1:])
        return F.scaled_dot_product_attention(query, *repeated, attn_mask=seen)

    contenders = [
        Contender("triton", ours("triton"), fresh),
        Contender("torch (blocks)", ours("torch"), fresh),
        Contender("SDPA, same rows by a mask", with_a_mask, masked, lambda output: output.transpose(1, 2)),
        Contender(
            "SDPA, dense causal",
            lambda: F.scaled_dot_product_attention(*whole, is_causal=True, enable_gqa=True),
            whole,
            lambda output: output.transpose(1, 2)[:, rows[0]],
        ),
    ]
    # its CPU form has no backward pass
    if sizes.device == "cuda":
        contenders.append(_flex_attention(masked, rows, n))
    return contenders


def _flex_attention(states: list[Tensor], rows: Tensor, n: int) -> Contender:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def seen(batch, head, query, key):
        return key <= rows[0, query]

    # its backward runs more than once over one forward
    torch._functorch.config.donated_buffer = False
    mask = create_block_mask(seen, None, None, rows.shape[1], n, device=rows.device, _compile=True)
    compiled = torch.compile(flex_attention)
    return Contender(
        "FlexAttention, same rows",
        lambda: compiled(*states, block_mask=mask, enable_gqa=True),
        states,
        lambda output: output.transpose(1, 2),
    )


def attention_mass(sizes: Sizes) -> list[Contender]:
    """What scouting adds to a layer: the attention of the voting queries, summed by key."""
    shape = sizes.shape
    rows = sizes._replace(rows=min(EVIDENCE_QUERIES, sizes.rows)).selected()
    query = sizes.random(1, shape.heads, rows.shape[1], shape.dim)
    key = sizes.random(1, shape.kv_heads, sizes.tokens, shape.dim)
    return [
        Contender(name, lambda impl=impl: kernels.attention_mass(query, key, rows, impl=impl))
        for name, impl in (("triton", "triton"), ("torch (blocks)", "torch"), ("eager", "reference"))
    ]


def linear_cross_entropy(sizes: Sizes) -> list[Contender]:
    """The head's loss over the selected rows."""
    hidden, weight, targets = _head(sizes, grad=True)

    def ours(impl: str) -> Callable[[], Tensor]:
        return lambda: kernels.linear_cross_entropy(hidden, weight, targets, impl=impl).mean()

    contenders = [
        Contender("triton", ours("triton"), (hidden, weight)),
        Contender("torch (chunks)", ours("torch"), (hidden, weight)),
        Contender("eager", lambda: F.cross_entropy(F.linear(hidden, weight).float(), targets), (hidden, weight)),
    ]
    if has_liger(sizes):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        # computes its gradients in forward
        liger = LigerFusedLinearCrossEntropyLoss()
        contenders.append(Contender("Liger", lambda: liger(weight, hidden, targets), (hidden, weight)))
    return contenders


def head_statistics(sizes: Sizes) -> list[Contender]:
    """What the scores `gradient`, `loss` and `entropy` read, over all rows."""
    hidden, weight, targets = _head(sizes._replace(rows=sizes.tokens))
    return [
        Contender(name, lambda impl=impl: kernels.head_statistics(hidden, weight, targets, impl=impl).entropy)
        for name, impl in (("triton", "triton"), ("torch (chunks)", "torch"))
    ]


def _head(sizes: Sizes, grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    shape = sizes.shape
    weight = (sizes.random(shape.vocabulary, shape.hidden) * shape.hidden**-0.5).requires_grad_(grad)
    targets = torch.randint(shape.vocabulary, (sizes.rows,), device=sizes.device)
    return sizes.random(sizes.rows, shape.hidden, grad=grad), weight, targets


def rms_norm(sizes: Sizes) -> list[Contender]:
    """Llama's norm."""
    width, eps = sizes.shape.hidden, 1e-6
    hidden, weight = sizes.random(sizes.rows, width, grad=True), sizes.random(width, grad=True)

    def eager() -> Tensor:
        wide = hidden.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(hidden.dtype)

    contenders = [
        Contender("triton", lambda: kernels.rms_norm(hidden, weight, eps, impl="triton"), (hidden, weight)),
        Contender("torch", lambda: kernels.rms_norm(hidden, weight, eps, impl="torch"), (hidden, weight)),
        Contender("eager", eager, (hidden, weight)),
        Contender("F.rms_norm", lambda: F.rms_norm(hidden, (width,), weight, eps), (hidden, weight)),
    ]
    if has_liger(sizes):
        from liger_kernel.transformers.functional import liger_rms_norm

        contenders.append(
            Contender("Liger", lambda: liger_rms_norm(hidden, weight, eps, in_place=False), (hidden, weight))
        )
    return contenders


def gated_linear(sizes: Sizes) -> list[Contender]:
    """The second half of a gated MLP: `down(silu(gate) * up)`."""
    shape = sizes.shape
    gate, up = (sizes.random(sizes.rows, shape.intermediate, grad=True) for _ in range(2))
    weight = (sizes.random(shape.hidden, shape.intermediate) * shape.intermediate**-0.5).requires_grad_()
    inputs = (gate, up, weight)

    def ours(impl: str) -> Callable[[], Tensor]:
        return lambda: kernels.gated_linear(gate, up, weight, None, "silu", impl=impl)

    contenders = [
        Contender("triton", ours("triton"), inputs),
        Contender("torch", ours("torch"), inputs),
        Contender("eager", lambda: F.linear(F.silu(gate) * up, weight), inputs),
    ]
    if has_liger(sizes):
        from liger_kernel.transformers.functional import liger_swiglu

        contenders.append(Contender("Liger", lambda: F.linear(liger_swiglu(gate, up), weight), inputs))
    return contenders


def compress(sizes: Sizes) -> list[Contender]:
    """What VeLoRA adds to the forward pass for the input of a `down_proj`, over all rows."""
    width = sizes.shape.intermediate
    x, size = sizes.random(sizes.tokens, width), -(-width // COMPRESSED_GROUPS)
    directions = sizes.random(1, width).float() * size**-0.5
    return [
        Contender(name, lambda impl=impl: kernels.compress(x, directions, size, impl=impl))
        for name, impl in (("triton", "triton"), ("torch", "torch"), ("eager", "reference"))
    ]


def token_rows(sizes: Sizes) -> list[Contender]:
    """What LeMo adds to a layer: its rows out of the residual stream and, here as they are, back into it."""
    states, rows = sizes.random(1, sizes.tokens, sizes.shape.hidden, grad=True), sizes.selected()
    index = rows[..., None].expand(-1, -1, sizes.shape.hidden)

    def ours(impl: str) -> Callable[[], Tensor]:
        def run() -> Tensor:
            rest, kept = kernels.split_rows(states, rows, impl)
            return kernels.join_rows(rest, kept, rows, impl=impl)

        return run

    return [
        Contender("triton", ours("triton"), [states]),
        Contender("torch", ours("torch"), [states]),
        Contender("gather and scatter", lambda: states.scatter(1, index, states.gather(1, index)), [states]),
    ]


def normed_rows(sizes: Sizes) -> list[Contender]:
    """The same with lean layers: the rows come with what the layer's first norm makes of them."""
    hidden, rows = sizes.shape.hidden, sizes.selected()
    states, weight = sizes.random(1, sizes.tokens, hidden, grad=True), sizes.random(hidden)

    def one_by_one(impl: str) -> tuple[Tensor, Tensor, Tensor]:
        rest, kept = kernels.split_rows(states, rows, impl)
        return rest, kept, kernels.rms_norm(kept, weight, 1e-6, impl=impl)

    def ours(split: Callable[[], tuple[Tensor, Tensor, Tensor]], impl: str) -> Callable[[], Tensor]:
        def run() -> Tensor:
            rest, kept, normed = split()
            return kernels.join_rows(rest, kept + normed, rows, impl=impl)

        return run

    def fused(impl: str) -> tuple[Tensor, Tensor, Tensor]:
        return kernels.split_normed_rows(states, rows, weight, 1e-6, impl=impl)

    return [
        Contender("triton", ours(partial(fused, "triton"), "triton"), [states]),
        Contender("triton, one by one", ours(partial(one_by_one, "triton"), "triton"), [states]),
        Contender("torch", ours(partial(fused, "torch"), "torch"), [states]),
    ]


def block_scores(sizes: Sizes) -> list[Contender]:
    """By what LeMo chooses the blocks of tokens that a layer works on, over all pairs."""
    shape, n = sizes.shape, sizes.tokens
    query, key = (sizes.random(1, heads, n, shape.dim) for heads in (shape.heads, shape.kv_heads))
    return [
        Contender(name, lambda impl=impl: kernels.block_scores(query, key, BLOCK, impl=impl))
        for name, impl in (("triton", "triton"), ("torch (blocks)", "torch"), ("eager", "reference"))
    ]


CASES = (
    selected_attention,
    attention_mass,
    linear_cross_entropy,
    head_statistics,
    rms_norm,
    gated_linear,
    compress,
    token_rows,
    normed_rows,
    block_scores,
)


def has_liger(sizes: Sizes) -> bool:
    """Whether Liger's kernels are installed and can run."""
    return sizes.device == "cuda" and importlib.util.find_spec("liger_kernel") is not None
