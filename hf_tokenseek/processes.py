"""Whether there are other ranks that compute the same step."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

_alone = False


def has_peers() -> bool:
    """Whether figures are to be shared with other ranks."""
    return not _alone and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def alone() -> Iterator[None]:
    """Inside the block this rank computes by itself: a step that it simulates is not one of the others'."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before
