"""Callbacks whose method has a state of its own, which each checkpoint gets as a file."""

from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from ..method_config import MethodConfig
from .logging import LoggedMetrics


class StatefulCallback(LoggedMetrics):
    """
    Base of the callbacks that attach a handle to the model and write its state into every checkpoint.

    Args:
        config ([`MethodConfig`], `dict` or `bool`, *optional*): of `config_type`; its defaults where it is not given.

    Attributes:
        config_type (`type`), handle_type (`type`): the method's configuration, and what is made of it and a model.
        state_file (`str`): the name of the file.
        method (`str`): what errors call the method.
        handle (*optional*): the attached method.
        checkpoint (`str` or `Path`, *optional*):
            Folder that a run is resumed from. [`TokenSeekTrainer`] sets it; else it is the checkpoint of the resumed
            step in `output_dir`.

    Raises:
        ValueError: the configuration turns the method off.
    """

    config_type: ClassVar[type[MethodConfig]]
    handle_type: ClassVar[type]
    state_file: ClassVar[str]
    method: ClassVar[str]

    def __init__(self, config: MethodConfig | dict | bool | None = None):
        self.config = self.config_type() if config is None else self.config_type.parse(config)
        if self.config is None:
            raise ValueError(f"{type(self).__name__} was told to be off. Leave it out of `callbacks` instead.")
        self.handle = None
        self.checkpoint: str | Path | None = None

    def attach(self, model: nn.Module) -> None:
        """Attaches the method to `model`, unless it is."""
        # `model_init` makes another model than the one that `__init__` has seen
        if self.handle is not None and self.handle.attached_to is not model:
            self.detach()
        if self.handle is None:
            self.handle = self.handle_type(model, self.config)

    def detach(self) -> None:
        """Gives the model back as it was."""
        self.handle.undo()
        self.handle = None

    def accept(self, optimizer) -> None:
        """Looks at the trainer's optimizer before anything is trained; raises `ValueError` if it does not fit."""

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        self.attach(model)
        try:
            self.accept(optimizer)
            if state.global_step:
                self.handle.load_state_dict(self.read_state(args, state))
        except ValueError:
            self.detach()
            raise
        if state.is_local_process_zero:
            print(self.handle.swapped(), flush=True)

    def on_save(self, args, state, control, **kwargs) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if args.should_save and folder.is_dir():
            scratch = folder / f"{self.state_file}.tmp"
            torch.save(self.handle.state_dict(), scratch)
            scratch.replace(folder / self.state_file)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.detach()

    def read_state(self, args, state) -> dict:
        """
        The method's state in the checkpoint that the run is resumed from.

        Raises:
            ValueError: the file is missing or cannot be read.
        """
        folder = Path(self.checkpoint or Path(args.output_dir) / f"checkpoint-{state.global_step}")
        file = folder / self.state_file
        if not file.is_file():
            raise ValueError(
                f"{folder} has no {self.state_file}: it was saved without {self.method}, or the run was killed while "
                f"it was saved. Resume from an older checkpoint, or turn {self.method} off."
            )
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a torn file makes torch raise
            raise ValueError(f"{file} cannot be read ({error}). Resume from an older checkpoint.") from error
