"""Other forwards in the place of an instance's own: put there, found, taken back."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, update_wrapper
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

logger = logging.get_logger(__name__)


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable):
    """Whoever calls `module` gets what `forward` returns; the module's hooks run as ever."""
    own = {name: value for name, value in vars(module).items() if name == "forward"}
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        vars(module).update(own)


def trains(model: nn.Module) -> bool:
    """Whether a forward pass is one of training; says once where a method does nothing because of the model's mode."""
    if model.training or not torch.is_grad_enabled():
        return model.training and torch.is_grad_enabled()
    logger.warning_once(
        f"{type(model).__name__} computes plainly in evaluation mode, as `from_pretrained` returns it: methods act "
        "while a model trains. Call model.train(), or torch.no_grad() if this is no training."
    )
    return False


class PatchedForward:
    """
    Replaces the `forward` of one instance, by default while it trains with gradients; else the original runs.

    Like a class's forward it is bound: a copy of the instance computes with its own weights, as before, and whoever
    unwraps or pickles a model finds the forward of its class.

    Args:
        model (`nn.Module`): the instance.
        run (`Callable`): called with the original forward, its positional and its keyword arguments.
        when (`Callable`, *optional*): whether to call `run` now.
    """

    def __init__(
        self,
        model: nn.Module,
        run: Callable[[Callable, tuple, dict], Any],
        when: Callable[[], bool] | None = None,
    ):
        self.model, self.run, self.active = model, run, True
        self.when = when or (lambda: model.training and torch.is_grad_enabled())
        self.before = vars(model).get("forward")
        self.function = self._function()
        self.forward = model.forward = MethodType(self.function, model)

    def undo(self) -> None:
        """Gives the original back; below a wrapper of somebody else's the patch only stops doing anything."""
        self.active = False
        if vars(self.model).get("forward") is self.forward:
            del self.model.forward
            vars(self.model).update({} if self.before is None else {"forward": self.before})
            return
        for function in _wrappers(self.model.forward):
            outer = getattr(function, "patch", None)
            if outer is not None and outer.before is self.forward:
                outer.before, function.__wrapped__ = self.before, self.function.__wrapped__

    def _function(self) -> Callable:
        original = self.model.forward

        def forward(module: nn.Module, *args, **kwargs):
            original = self._original(module)
            if self.active and module is self.model and self.when():
                return self.run(original, args, kwargs)
            return original(*args, **kwargs)

        update_wrapper(forward, _function_of(original))
        signature = inspect.signature(original)
        own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        forward.__signature__ = signature.replace(parameters=[own, *signature.parameters.values()])
        forward.patch = self
        return forward

    def _original(self, module: nn.Module) -> Callable:
        if self.before is None:
            # of whatever class it has now: FSDP2 gives a layer another one, and only that one's forward checkpoints
            return partial(type(module).forward, module)
        bound = getattr(self.before, "__self__", None) is self.model
        return MethodType(self.before.__func__, module) if bound else self.before


def leads_to(forward: Callable, patched: Callable) -> bool:
    """Whether `forward` is `patched`, or one of the wrappers around it that say what they wrap."""
    return any(function is _function_of(patched) for function in _wrappers(forward))


def patched_by(module: nn.Module, kind: type) -> Any:
    """The object of this kind whose method runs in place of the module's forward; `None` where there is none."""
    for function in _wrappers(module.forward):
        patch = getattr(function, "patch", None)
        if patch is not None and patch.active and patch.model is module:
            owner = getattr(patch.run, "__self__", None)
            if isinstance(owner, kind):
                return owner
    return None


def hooked_by(module: nn.Module, kind: type) -> Any:
    """The object of this kind whose method runs before the module's forward; `None` where there is none."""
    owners = (getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, kind)), None)


def is_reached(patch: PatchedForward, past: type) -> bool:
    """Whether a call of the model comes to `patch`; an object of the kind `past` calls nothing of what it wraps."""
    owner = patched_by(patch.model, past)
    inside = owner is not None and leads_to(owner.patch.forward, patch.forward)
    return leads_to(patch.model.forward, patch.forward) and not inside


def _function_of(forward: Callable) -> Callable:
    return getattr(forward, "__func__", forward)


def _wrappers(forward: Callable | None) -> Iterator[Callable]:
    """A forward's function, and what it wraps, as far as that is said."""
    while forward is not None:
        forward = _function_of(forward)
        yield forward
        forward = getattr(forward, "__wrapped__", None)
