"""Whose handle a model has: the newest trainer's, and nobody's after a run; and callbacks that put one on it."""

from typing import Any, ClassVar

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


class Attaching:
    """
    A callback that puts a handle on the model when a run begins, and takes it off when it ends.

    Attributes:
        handle_type (`type`): what is put on the model; knows it as `attached_to`.
        handle (*optional*): the attached one.
    """

    handle_type: ClassVar[type]
    handle: Any = None

    def build(self, model: nn.Module) -> Any:
        """A handle on `model`."""
        raise NotImplementedError

    def attach(self, model: nn.Module) -> None:
        """Attaches to `model`, unless it is; in place of what another trainer has attached to it."""
        # `model_init` makes another model than the one that `__init__` has seen
        if self.handle is not None and not (self.handle.attached_to is model and is_owner(model, self.handle)):
            self.detach()
        if self.handle is None:
            take_over(model, self.handle_type)
            self.handle = self.build(model)
            own(model, self.handle)

    def detach(self) -> None:
        """Gives the model back as it was, if it is attached to one."""
        if self.handle is not None:
            disown(self.handle.attached_to, self.handle)
        self.handle = None

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.detach()
