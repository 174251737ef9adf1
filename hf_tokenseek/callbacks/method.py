"""Callbacks that put a method on the model."""

from typing import ClassVar

from torch import nn

from ..method_config import MethodConfig
from .logging import LoggedMetrics
from .ownership import Attaching


class MethodCallback(Attaching, LoggedMetrics):
    """
    Base of the callbacks that attach a handle to the model when a run begins and take it off when it ends.

    Args:
        config ([`MethodConfig`], `dict` or `bool`, *optional*): of `config_type`; its defaults where it is not given.

    Attributes:
        config_type (`type`), handle_type (`type`): the method's configuration, and what is made of it and a model.
        handle (*optional*): the attached method.

    Raises:
        ValueError: the configuration turns the method off.
    """

    config_type: ClassVar[type[MethodConfig]]

    def __init__(self, config: MethodConfig | dict | bool | None = None):
        self.config = self.config_type() if config is None else self.config_type.parse(config)
        if self.config is None:
            raise ValueError(f"{type(self).__name__} was told to be off. Leave it out of `callbacks` instead.")

    def build(self, model: nn.Module):
        """The method on `model`."""
        return self.handle_type(model, self.config)

    def prepare(self, args, state, optimizer) -> None:
        """Whatever is to be done between attaching and training; raises `ValueError` if the run cannot go on."""

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        self.attach(model)
        try:
            self.prepare(args, state, optimizer)
        except ValueError:
            self.detach()
            raise
        if state.is_local_process_zero:
            print(self.handle.swapped(), flush=True)
