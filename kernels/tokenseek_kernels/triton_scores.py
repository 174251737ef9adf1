"""
What the attention kernels share, in registers: the rule on positions of `scores.visible`, and the scores.

Scores are in units of log2, where the GPU's exponential lives: host functions hand over `scale` and `softcap` times
log2(e).
"""

import math

import triton
import triton.language as tl

LOG2E = tl.constexpr(math.log2(math.e))
NEVER = tl.constexpr(2**31 - 1)


@triton.jit
def load_tile(matrix, stride, index, keep, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """
    Rows `index` of a matrix, [index, BLOCK_DIM]: zeros behind DIM and where `keep` is false (None keeps all). Every
    row starts at a multiple of 16 bytes.
    """
    column = tl.arange(0, BLOCK_DIM)[None, :]
    pointers = tl.multiple_of(matrix + index[:, None] * stride + column, [1, 16])
    mask = None
    if DIM != BLOCK_DIM:
        mask = column < DIM
    if keep is not None:
        mask = keep[:, None] if mask is None else mask & keep[:, None]
    return tl.load(pointers, mask=mask, other=None if mask is None else 0.0)


@triton.jit
def store_tile(matrix, stride, index, keep, tile, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """
    Writes rows `index` of a matrix where `keep` is true, in its dtype. It starts at a multiple of 16 bytes, and rows
    are a multiple of DIM apart.
    """
    column = tl.arange(0, BLOCK_DIM)[None, :]
    pointers = matrix + index[:, None] * stride + column
    if DIM % 16 == 0:
        pointers = tl.multiple_of(pointers, [1, 16])
    tl.store(pointers, tile.to(matrix.dtype.element_ty), mask=keep[:, None] & (column < DIM))


@triton.jit
def positions_of(rows, slot, n_rows):
    """Position of every slot, -1 for empty ones and behind the last."""
    return tl.load(rows + slot, mask=slot < n_rows, other=-1).to(tl.int32)


@triton.jit
def segments_of(segments, position, exists, PADDING: tl.constexpr):
    """
    Document number at every position; padding is PADDING, another for queries than for keys, so that none match.
    Without segments it is the position, which nobody reads: up to Triton 3.6 a function cannot return None to another.
    """
    document = position
    if segments is not None:
        document = tl.load(segments + position, mask=exists, other=PADDING).to(tl.int32)
        document = tl.where(document < 0, PADDING, document)
    return document


@triton.jit
def first_seen(first_keys, slot, n_rows):
    """
    Index of the first key that the query in every slot sees, where each is told; otherwise the slot, which nobody
    reads: a window in tokens follows from positions.
    """
    first = slot
    if first_keys is not None:
        first = tl.load(first_keys + slot, mask=slot < n_rows, other=NEVER)
    return first


@triton.jit
def visible(query, own, first, key, document, segments, first_keys, window, KEY_AXIS: tl.constexpr):
    """
    Who sees whom: [queries, keys], or [keys, queries] where KEY_AXIS is 0. `own` = documents of the queries, `first` =
    the first keys they see.
    """
    QUERY_AXIS: tl.constexpr = 1 - KEY_AXIS
    # a vector that runs along an axis is expanded at the other one
    query, key = tl.expand_dims(query, KEY_AXIS), tl.expand_dims(key, QUERY_AXIS)
    seen = key <= query
    if first_keys is not None:
        seen = seen & (key >= tl.expand_dims(first, KEY_AXIS))
    elif window is not None:
        seen = seen & (key > query - window)
    if segments is not None:
        seen = seen & (tl.expand_dims(document, QUERY_AXIS) == tl.expand_dims(own, KEY_AXIS))
    return seen


@triton.jit
def softcapped(products, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """
    `softcap * tanh(scale * product / softcap)`.

    Constants of a model are constants of its kernels: as an argument, Triton would round a float to float32.
    """
    scores = products * SCALE
    if SOFTCAP is not None:
        scores = SOFTCAP * (2 * tl.sigmoid(scores * (2 / SOFTCAP)) - 1)
    return scores


@triton.jit
def softcap_slope(scores, SOFTCAP: tl.constexpr):
    """Slope of the softcap, `1 - tanh^2`, from its result."""
    share = scores / SOFTCAP
    return 1 - share * share


@triton.jit
def extent(numbers):
    """Smallest and largest of the numbers that are not negative."""
    return tl.min(tl.where(numbers >= 0, numbers, NEVER)), tl.max(numbers)


@triton.jit
def windows_begin(own_first, position, first, last, first_keys, window):
    """Where the windows of the queries of a block, from `first` to `last`, begin: the first of them and the last."""
    earliest = 0
    latest = 0
    if first_keys is not None:
        earliest = tl.min(tl.where(position >= 0, own_first, NEVER))
        latest = tl.max(tl.where(position >= 0, own_first, 0))
    elif window is not None:
        earliest = first - window + 1
        latest = last - window + 1
    return earliest, latest


@triton.jit
def keys_read(first, last, earliest, latest, segments, window, BLOCK: tl.constexpr):
    """
    `(begin, whole_begin, whole_end, end)`: the keys that queries from `first` to `last` read, whose windows begin from
    `earliest` to `latest`. All of them, empty slots aside, see every key between the inner two, so that the rule is
    needed in the margins only; the first three are multiples of BLOCK.
    """
    begin = 0
    if window is not None:
        begin = tl.maximum(earliest, 0) // BLOCK * BLOCK
    whole_begin = begin
    whole_end = begin
    if segments is None:
        if window is not None:
            whole_begin = tl.maximum(begin, tl.cdiv(tl.maximum(latest, 0), BLOCK) * BLOCK)
        whole_end = tl.maximum(whole_begin, (tl.minimum(first, last) + 1) // BLOCK * BLOCK)
    return begin, whole_begin, whole_end, last + 1


@triton.jit
def in_reach(key, document, earliest, last, lowest, highest, segments, window):
    """
    Which keys are read by queries up to `last`, whose windows begin at `earliest` or behind it, of documents from
    `lowest` to `highest`: all that one of them sees, and none of padding, of the future, in front of the window, of
    other documents. (Weight 0 is no cure for a NaN.)
    """
    reached = key <= last
    if window is not None:
        reached = reached & (key >= earliest)
    if segments is not None:
        reached = reached & (document >= lowest) & (document <= highest)
    return reached


@triton.jit
def first_slot_from(rows, n_rows, position, BLOCK: tl.constexpr):
    """The first slot whose row is at `position` or behind it; `n_rows` where there is none."""
    found = n_rows
    for start in range(0, n_rows, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        found = tl.minimum(found, tl.min(tl.where(positions_of(rows, slot, n_rows) >= position, slot, n_rows)))
    return found


@triton.jit
def slots_before(rows, n_rows, position, BLOCK: tl.constexpr):
    """How many slots there are up to the last row in front of `position`."""
    found = 0
    for start in range(0, n_rows, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        own = positions_of(rows, slot, n_rows)
        found = tl.maximum(found, tl.max(tl.where((own >= 0) & (own < position), slot + 1, 0)))
    return found
