"""Whose handle a model has: the newest trainer's, and nobody's after a run."""

from typing import Any

from torch import nn

_NAME = "_tokenseek_attached"


class Attached(dict):
    """Handles that callbacks have put on a model, by their type. They do not go with a copy of it, nor into a file."""

    def __deepcopy__(self, memo: dict) -> "Attached":
        return Attached()

    def __reduce__(self):
        return Attached, ()


def is_owner(model: nn.Module, handle: Any) -> bool:
    """Whether `handle` is what the model has of its type."""
    return vars(model).get(_NAME, {}).get(type(handle)) is handle


def take_over(model: nn.Module, kind: type) -> None:
    """Undoes the handle of this type that the callback of another trainer has left on the model."""
    other = vars(model).get(_NAME, {}).pop(kind, None)
    if other is not None:
        other.undo()


def own(model: nn.Module, handle: Any) -> None:
    """Says that the model has `handle` of its type."""
    vars(model).setdefault(_NAME, Attached())[type(handle)] = handle


def disown(model: nn.Module, handle: Any) -> None:
    """Undoes `handle`, unless another has taken over."""
    if is_owner(model, handle):
        take_over(model, type(handle))
    if not vars(model).get(_NAME, True):
        delattr(model, _NAME)
