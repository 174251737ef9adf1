"""What attention refuses before it computes, whichever of its operations is asked."""

import pytest
import torch

from tokenseek_kernels import attention_mass, causal_attention, selected_attention

B, H, KV, N, K, D = 2, 4, 2, 7, 3, 8


def states(**changes) -> dict[str, torch.Tensor]:
    sizes = {"query": (B, H, K, D), "key": (B, KV, N, D), "value": (B, KV, N, D), **changes}
    return {name: torch.zeros(size) for name, size in sizes.items()}


def select(query, key, value, rows, **rule):
    fresh = (given.new_zeros(*given.shape[:2], K, given.shape[-1]) for given in (key, value))
    return selected_attention(query, *fresh, key, value, rows, **rule)


def mass(query, key, value, rows, **rule):
    return attention_mass(query, key, rows, **rule)


def causal(query, key, value, rows, **rule):
    return causal_attention(torch.zeros(query.shape[0], query.shape[1], N, query.shape[3]), key, value, **rule)


WRONG = {
    "dim": (
        {"key": (B, KV, N, D + 1)},
        {},
        r"`query` \(.*\) and `key` \(2, 2, 7, 9\) must be .*one batch and one dim",
    ),
    "batch": ({"key": (B + 1, KV, N, D), "value": (B + 1, KV, N, D)}, {}, "one batch and one dim"),
    "heads": ({"key": (B, 3, N, D), "value": (B, 3, N, D)}, {}, r"query heads \(4\) must be a multiple of .* \(3\)"),
    "segments": ({}, {"segments": torch.zeros(B, N + 1).long()}, r"`segments` \(2, 8\) must be \(batch, keys\)"),
    "first keys": (
        {},
        {"window": 2, "first_keys": torch.zeros(B, K).long()},
        r"`first_keys` \(2, 3\) must be \(batch, keys\) of key \(2, 2, 7, 8\)",
    ),
    "no window": ({}, {"first_keys": torch.zeros(B, N).long()}, "beside a `window` in tokens, got window=None"),
    "window": ({}, {"window": 0}, "`window` should be at least 1"),
}


@pytest.mark.parametrize("attend", [select, mass, causal])
@pytest.mark.parametrize(("changes", "rule", "said"), WRONG.values(), ids=WRONG.keys())
def test_what_does_not_fit_together(attend, changes, rule, said):
    rows = torch.arange(K).expand(B, -1)
    attend(**states(), rows=rows)
    with pytest.raises(ValueError, match=said):
        attend(**states(**changes), rows=rows, **rule)


@pytest.mark.parametrize("attend", [select, mass])
def test_rows_are_those_of_the_queries(attend):
    with pytest.raises(ValueError, match=r"`rows` \(2, 4\) must be \(batch, rows\)"):
        attend(**states(), rows=torch.arange(4).expand(B, -1))


@pytest.mark.parametrize("attend", [select, causal])
def test_values_are_those_of_the_keys(attend):
    with pytest.raises(ValueError, match=r"`value` \(2, 2, 6, 8\) must be \(batch, kv_heads, keys, ...\) of key"):
        attend(**states(value=(B, KV, N - 1, D)), rows=torch.arange(K).expand(B, -1))


def test_causal_attention_is_of_all_rows():
    with pytest.raises(ValueError, match="`key` .* must have a row for each of the 3 queries"):
        causal_attention(**states())
