"""What every attention operation here shares: who sees whom, and the scores of a block of query rows."""

from collections.abc import Iterator

import torch

from .dispatch import IMPLEMENTATIONS, resolve_impl

# Temporaries of size rows x keys stay below this at any sequence length; float32 copies of K and V come on top.
WORKSPACE_MIB = 64

# The largest heads that the Triton kernels hold in registers, by bytes an element.
TRITON_HEAD_SIZES = {2: 256, 4: 64, 8: 32}


def resolve_attention_impl(
    impl: str, query: torch.Tensor, value_dim: int = 0, allowed: tuple[str, ...] = IMPLEMENTATIONS
) -> str:
    """As [`resolve_impl`], but that `"auto"` takes torch where heads are too large for the Triton kernels."""
    resolved = resolve_impl(impl, query, allowed)
    too_large = max(query.shape[-1], value_dim) > TRITON_HEAD_SIZES[query.element_size()]
    return "torch" if impl == "auto" and resolved == "triton" and too_large else resolved


def check_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    rows: torch.Tensor | None,
    segments: torch.Tensor | None,
    window: int | None,
    value: torch.Tensor | None = None,
    first_keys: torch.Tensor | None = None,
) -> None:
    """
    Refuses what does not fit together; arguments as in [`visible`] and `selected_attention`.

    Raises:
        ValueError: names the argument and what it has to be.
    """
    if window is not None and window < 1:
        raise ValueError(
            f"`window` should be at least 1 (the query's own token), got {window}. Use None for no window."
        )
    if first_keys is not None and (window is None or first_keys.shape != (len(key), key.shape[2])):
        raise ValueError(
            f"`first_keys` {tuple(first_keys.shape)} must be (batch, keys) of key {tuple(key.shape)}, beside a "
            f"`window` in tokens, got window={window}."
        )
    if query.dim() != 4 or key.dim() != 4 or (len(query), query.shape[3]) != (len(key), key.shape[3]):
        raise ValueError(
            f"`query` {tuple(query.shape)} and `key` {tuple(key.shape)} must be (batch, heads, tokens, dim) with one "
            "batch and one dim."
        )
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"query heads ({query.shape[1]}) must be a multiple of key/value heads ({key.shape[1]}).")
    if value is not None and value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"`value` {tuple(value.shape)} must be (batch, kv_heads, keys, ...) of key {tuple(key.shape)}."
        )
    if rows is not None and rows.shape != (len(query), query.shape[2]):
        raise ValueError(f"`rows` {tuple(rows.shape)} must be (batch, rows) of query {tuple(query.shape)}.")
    if segments is not None and segments.shape != (len(key), key.shape[2]):
        raise ValueError(f"`segments` {tuple(segments.shape)} must be (batch, keys) of key {tuple(key.shape)}.")


def visible(
    rows: torch.Tensor,
    segments: torch.Tensor | None,
    n_keys: int,
    window: int | None,
    first_keys: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    The one rule on positions that covers causal, sliding-window, padded and packed attention.

    The query at index `i` sees the key at index `j` if `j <= i`, both lie in the same segment (a document; padding has
    segment -1 and is seen by nobody) and, with a window, `i - j < window`.

    Args:
        rows (`torch.LongTensor` of shape `(batch, queries)`):
            Index of each query in its sequence; -1 is an empty slot that sees nothing.
        segments (`torch.LongTensor` of shape `(batch, keys)`, *optional*):
            Document number of every token, -1 for padding. `None` means one document without padding on the left.
        n_keys (`int`):
            Number of keys.
        window (`int`, *optional*):
            Sliding window: how many keys, its own included, a query sees.
        first_keys (`torch.LongTensor` of shape `(batch, keys)`, *optional*):
            In place of the window: the first key that the query at each index sees.

    Returns:
        `torch.BoolTensor` of shape `(batch, queries, keys)`.
    """
    query, key = rows[:, :, None], torch.arange(n_keys, device=rows.device)
    seen = key <= query
    if first_keys is not None:
        seen = seen & (key >= first_keys.gather(1, rows.clamp(min=0))[:, :, None])
    elif window is not None:
        seen = seen & (key > query - window)
    if segments is not None:
        own = segments.gather(1, rows.clamp(min=0))[:, :, None]
        seen = seen & (segments[:, None, :n_keys] == own) & (own >= 0)
    return seen


def sees_itself(rows: torch.Tensor, segments: torch.Tensor | None) -> torch.Tensor:
    """Whether the queries see anything under the rule of [`visible`]: a real token sees itself. `(batch, queries)`."""
    real = rows >= 0
    return real if segments is None else real & (segments.gather(1, rows.clamp(min=0)) >= 0)


def row_blocks(n_rows: int, bytes_per_row: int) -> Iterator[slice]:
    """Slices of `n_rows` rows whose temporaries of `bytes_per_row` fit into the workspace (at least one row each)."""
    step = max(1, WORKSPACE_MIB * 2**20 // max(1, bytes_per_row))
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))


def wide_dtype(states: torch.Tensor) -> torch.dtype:
    """The dtype sums are kept in: float32 (float64 stays, so that gradcheck sees the real thing)."""
    return torch.promote_types(states.dtype, torch.float32)


def wide(states: torch.Tensor) -> torch.Tensor:
    """`states` in the dtype sums are kept in."""
    return states.to(wide_dtype(states))


def group_heads(states: torch.Tensor, n_kv_heads: int) -> torch.Tensor:
    """`(batch, heads, rows, dim)` -> `(batch, kv_heads, group * rows, dim)`: grouped K/V serve without a copy."""
    batch, heads, rows, dim = states.shape
    return states.reshape(batch, n_kv_heads, heads // n_kv_heads * rows, dim)


def masked_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    seen: torch.Tensor,
    real: torch.Tensor,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """
    Attention scores of a block of query rows in float32 (or float64), -inf where a query does not see a key. A query
    that sees nothing keeps its scores, so that its softmax is finite; callers leave such rows out.

    Args:
        query (`torch.Tensor` of shape `(batch, heads, rows, dim)`): the block's queries.
        key (`torch.Tensor` of shape `(batch, kv_heads, keys, dim)`): all keys.
        seen (`torch.BoolTensor` of shape `(batch, rows, keys)`): from [`visible`].
        real (`torch.BoolTensor` of shape `(batch, rows)`): from [`sees_itself`].
        scale (`float`): factor on the scores.
        softcap (`float`, *optional*): `softcap * tanh(score / softcap)` before masking.

    Returns:
        `torch.FloatTensor` of shape `(batch, heads, rows, keys)`.
    """
    batch, heads, rows, _ = query.shape
    # scaled before the product, where it is small
    grouped = wide(group_heads(query, key.shape[1])) * scale
    scores = (grouped @ wide(key).transpose(-1, -2)).view(batch, heads, rows, key.shape[2])
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    hidden = ~seen & real[:, :, None]
    return scores.masked_fill_(hidden[:, None], float("-inf"))


def log_sum_exp(scores: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """
    Log-sum-exp of the last dimension, read off scores and their softmax.

    The largest probability is `exp(max - lse)`. Softmax kernels are several times faster than `exp` and `logsumexp` on
    rows that are half -inf, as causal ones are.
    """
    return scores.amax(-1) - probabilities.amax(-1).log()
