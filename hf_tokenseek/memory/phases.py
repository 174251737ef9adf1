"""Which part of a training step is running, said by those who know."""

from collections.abc import Iterator
from contextlib import contextmanager

PHASES = ("forward", "scout", "select", "backward", "step")

_said: str | None = None


@contextmanager
def phase(name: str) -> Iterator[None]:
    """
    Says that what runs inside the block is this phase of training, for whoever tracks memory. Blocks may nest.

    `"forward"` and `"backward"` need no saying: a tracker sees whether autograd is at work.

    Args:
        name (`str`): `"scout"`, `"select"`, `"step"`, or a method's own.
    """
    global _said
    before, _said = _said, name
    try:
        yield
    finally:
        _said = before


def said() -> str | None:
    """The innermost phase that was said, `None` outside of all blocks."""
    return _said
