"""What was swapped where, and how to take it back: [`attach`] and its handle."""

import functools
import inspect
from collections.abc import Callable

from torch import nn

from .families import check_family


def find_causal_lm(model: nn.Module) -> nn.Module:
    """
    The `...ForCausalLM` inside parallel wrappers and PEFT models.

    Raises:
        ValueError: the model's family is refused or unknown.
    """
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    check_family(model)
    return model


class PatchedForward:
    """
    Replaces the `forward` of one instance while training with gradients; everything else runs the original.

    Args:
        model (`nn.Module`): the instance.
        train (`Callable`): called with the bound arguments of `forward` in training.
    """

    def __init__(self, model: nn.Module, train: Callable):
        self.model, self.original, self.enabled = model, model.forward, True
        self.own_before = "forward" in vars(model)
        signature = inspect.signature(self.original)

        @functools.wraps(self.original)
        def forward(*args, **kwargs):
            import torch

            if not (self.enabled and model.training and torch.is_grad_enabled()):
                return self.original(*args, **kwargs)
            bound = signature.bind(*args, **kwargs)
            named = dict(bound.arguments)
            named.update(named.pop("kwargs", {}))
            return train(**named)

        self.forward = model.forward = forward

    def undo(self) -> None:
        """Gives the original back; under a wrapper that was put on later, the patch only stops doing anything."""
        self.enabled = False
        if vars(self.model).get("forward") is self.forward:
            if self.own_before:
                self.model.forward = self.original
            else:
                del self.model.forward


class Attachment:
    """
    Handle of what [`attach`] did; a context manager.

    Args:
        seek ([`SeekHandle`], *optional*): the attached TokenSeek.
    """

    def __init__(self, seek=None):
        self.seek = seek

    @property
    def selection(self):
        """`torch.LongTensor` of shape `(batch, k)`: rows of the last training forward, ascending, -1 padded."""
        return self.seek.selection

    def report(self) -> str:
        """The table of what was swapped, and what the last micro-batch cost."""
        return self.seek.report()

    def undo(self) -> None:
        """Takes everything back."""
        self.seek.undo()

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, *error) -> None:
        self.undo()


def attach(model: nn.Module, *, seek=None) -> Attachment:
    """
    Attaches methods to a model for plain training loops.

    ```python
    with attach(model, seek=SeekConfig(context=0.2)) as handle:
        loss = model(**batch).loss
        loss.backward()
        print(handle.report())
    ```

    Args:
        model (`transformers.PreTrainedModel` or `peft.PeftModel`):
            The model; its instance is patched, never its class.
        seek ([`SeekConfig`], `dict` or `bool`, *optional*):
            TokenSeek's configuration; `True` for the defaults.

    Returns:
        [`Attachment`]: with `selection`, `report()` and `undo()`.

    Raises:
        ValueError: nothing is to be attached, the model is not supported, or it is attached already.
    """
    from .seek import SeekConfig
    from .seek.attach import SeekHandle

    config = SeekConfig.parse(seek)
    if config is None:
        raise ValueError("attach() got no method to attach. Pass seek=SeekConfig() or seek=True.")
    return Attachment(SeekHandle(model, config))
