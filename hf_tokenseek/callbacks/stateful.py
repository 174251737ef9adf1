"""Callbacks whose method has a state of its own, which each checkpoint gets as a file."""

from pathlib import Path
from typing import ClassVar

import torch

from ..files import written_whole
from ..method_config import MethodConfig
from .method import MethodCallback


class StatefulCallback(MethodCallback):
    """
    Base of the callbacks whose handle's state is written into every checkpoint, and read again by a resumed run.

    Args:
        config ([`MethodConfig`], `dict` or `bool`, *optional*): of `config_type`; its defaults where it is not given.

    Attributes:
        state_file (`str`): the name of the file.
        method (`str`): what errors call the method.
        checkpoint (`str` or `Path`, *optional*):
            Folder that a run is resumed from. [`TokenSeekTrainer`] sets it; else it is the checkpoint of the resumed
            step in `output_dir`.

    Raises:
        ValueError: the configuration turns the method off.
    """

    state_file: ClassVar[str]
    method: ClassVar[str]

    def __init__(self, config: MethodConfig | dict | bool | None = None):
        super().__init__(config)
        self.checkpoint: str | Path | None = None

    def accept(self, optimizer) -> None:
        """Looks at the trainer's optimizer before anything is trained; raises `ValueError` if it does not fit."""

    def prepare(self, args, state, optimizer) -> None:
        """Accepts the optimizer, and goes on from a checkpoint's state."""
        self.accept(optimizer)
        if state.global_step:
            self.handle.load_state_dict(self.read_state(args, state))

    def on_save(self, args, state, control, **kwargs) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if args.should_save and folder.is_dir():
            with written_whole(folder / self.state_file) as scratch:
                torch.save(self.handle.state_dict(), scratch)

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
