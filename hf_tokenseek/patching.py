"""What was swapped where, and how to take it back: [`attach`] and its handle."""

import functools
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
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


def find_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """
    The decoder layers of a causal language model, and their path.

    Raises:
        ValueError: there is no list of as many modules as the config has layers.
    """
    count = model.config.get_text_config().num_hidden_layers
    for path, module in model.base_model.named_modules(prefix=model.base_model_prefix):
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return path, module
    raise ValueError(f"{type(model).__name__} has no list of {count} decoder layers: not supported.")


@contextmanager
def evaluating(model: nn.Module):
    """
    Evaluation mode without dropout and router noise; gives every module its own mode back.

    The layers of bitsandbytes keep theirs: on some CPUs a 4-bit layer in evaluation mode repacks its weight for
    inference, for good, and has no backward any more.
    """
    training = [m for m in model.modules() if m.training and not type(m).__module__.startswith("bitsandbytes.")]
    # written past nn.Module's __setattr__, which takes longer for a thousand modules than a small model's forward
    for module in training:
        vars(module)["training"] = False
    try:
        yield
    finally:
        for module in training:
            vars(module)["training"] = True


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


class PatchedForward:
    """
    Replaces the `forward` of one instance while it trains with gradients; everything else runs the original.

    Args:
        model (`nn.Module`): the instance.
        train (`Callable`): called with the original forward, its positional and its keyword arguments.
    """

    def __init__(self, model: nn.Module, train: Callable[[Callable, tuple, dict], Any]):
        self.model, self.active = model, True
        self.before = {name: value for name, value in vars(model).items() if name == "forward"}
        self.original = original = model.forward

        @functools.wraps(original)
        def forward(*args, **kwargs):
            if self.active and model.training and torch.is_grad_enabled():
                return train(original, args, kwargs)
            return original(*args, **kwargs)

        self.forward = model.forward = forward

    def undo(self) -> None:
        """Gives the original back; below a wrapper that was put on later, the patch only stops doing anything."""
        self.active = False
        if vars(self.model).get("forward") is self.forward:
            del self.model.forward
            vars(self.model).update(self.before)


def leads_to(forward: Callable | None, patched: Callable) -> bool:
    """Whether `forward` is `patched`, or one of the wrappers around it that say what they wrap."""
    while forward is not None and forward is not patched:
        forward = getattr(forward, "__wrapped__", None)
    return forward is patched


class Attachment:
    """
    Handle of what [`attach`] did; a context manager.

    Args:
        seek ([`SeekHandle`], *optional*): the attached TokenSeek.
        lean ([`LeanHandle`], *optional*): the lean layers.
        velora ([`VeloraHandle`], *optional*): the attached VeLoRA.
        ist ([`IstHandle`], *optional*): the attached sparse tuning.
    """

    def __init__(self, seek=None, lean=None, velora=None, ist=None):
        self.seek, self.lean, self.velora, self.ist = seek, lean, velora, ist

    @property
    def selection(self):
        """
        `torch.LongTensor` of shape `(batch, k)`: rows of the last training forward, ascending, -1 padded.

        Raises:
            ValueError: TokenSeek is not attached.
        """
        if self.seek is None:
            raise ValueError("There is no selection: TokenSeek is not attached. Call attach(model, seek=True).")
        return self.seek.selection

    def report(self) -> str:
        """The table of what was swapped, and what the last micro-batch cost."""
        return "\n".join(handle.report() for handle in self._handles())

    def undo(self) -> None:
        """Takes everything back."""
        for handle in reversed(self._handles()):
            handle.undo()

    def _handles(self) -> list:
        return [handle for handle in (self.seek, self.lean, self.velora, self.ist) if handle is not None]

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, *error) -> None:
        self.undo()


def attach(model: nn.Module, *, seek=None, velora=None, ist=None, lean: bool = False) -> Attachment:
    """
    Attaches methods to a model for plain training loops.

    ```python
    with attach(model, seek=SeekConfig(context=0.2), lean=True) as handle:
        loss = model(**batch).loss
        loss.backward()
        print(handle.report())
    ```

    Args:
        model (`transformers.PreTrainedModel` or `peft.PeftModel`):
            The model; its instance is patched, never its class.
        seek ([`SeekConfig`], `dict` or `bool`, *optional*):
            TokenSeek's configuration; `True` for the defaults.
        velora ([`VeloraConfig`], `dict` or `bool`, *optional*):
            VeLoRA's configuration; `True` for the defaults. With `compressed_state`, hand the model's trained
            parameters to [`~velora.VeloraAdamW`] afterwards.
        ist ([`IstConfig`], `dict` or `bool`, *optional*):
            Sparse tuning's configuration; `True` for the defaults. Build the optimizer afterwards, hand it over with
            `handle.ist.manage(optimizer)`, and call `handle.ist.begin_step(step)` before each of its steps.
        lean (`bool`, *optional*, defaults to `False`):
            Swap norms, MLPs and LoRA layers for exact ones that save less.

    Returns:
        [`Attachment`]: with `selection`, `report()` and `undo()`.

    Raises:
        ValueError: nothing is to be attached, the model is not supported, or it is attached already.
    """
    from .ist import IstConfig
    from .ist.attach import IstHandle
    from .lean import LeanHandle
    from .seek import SeekConfig
    from .seek.attach import SeekHandle
    from .velora import VeloraConfig
    from .velora.attach import VeloraHandle

    config, velora_config, ist_config = SeekConfig.parse(seek), VeloraConfig.parse(velora), IstConfig.parse(ist)
    if config is None and velora_config is None and ist_config is None and not lean:
        raise ValueError("attach() got no method to attach. Pass seek=True, velora=True, ist=True or lean=True.")
    attached = Attachment()
    try:
        if config is not None:
            attached.seek = SeekHandle(model, config)
        if lean:
            attached.lean = LeanHandle(model)
        if velora_config is not None:
            attached.velora = VeloraHandle(model, velora_config)
        if ist_config is not None:
            attached.ist = IstHandle(model, ist_config)
    except ValueError:
        attached.undo()
        raise
    return attached
