"""Callbacks whose method has a state of its own, which each checkpoint gets as a file."""

from pathlib import Path
from typing import ClassVar

import torch

from .logging import LoggedMetrics


class StatefulCallback(LoggedMetrics):
    """
    Base of the callbacks that write a file into every checkpoint and read it when a run is resumed.

    Attributes:
        state_file (`str`): its name.
        method (`str`): what errors call the method.
        checkpoint (`str` or `Path`, *optional*):
            Folder that a run is resumed from. [`TokenSeekTrainer`] sets it; else it is the checkpoint of the resumed
            step in `output_dir`.
    """

    state_file: ClassVar[str]
    method: ClassVar[str]
    checkpoint: str | Path | None = None

    def write_state(self, args, state, content: dict) -> None:
        """Writes the method's state beside what the trainer has saved."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if args.should_save and folder.is_dir():
            scratch = folder / f"{self.state_file}.tmp"
            torch.save(content, scratch)
            scratch.replace(folder / self.state_file)

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
