"""Training arguments with one field a method."""

from dataclasses import asdict, dataclass, field
from typing import Any

from transformers import TrainingArguments

from .seek import SeekConfig


@dataclass
class TokenSeekArguments(TrainingArguments):
    """
    [`~transformers.TrainingArguments`] with a field for each method of hf_tokenseek.

    > Parameters that control token selection

    Args:
        seek ([`SeekConfig`], `dict` or `str`, *optional*, defaults to `"true"`):
            TokenSeek's configuration: a config, its fields, their JSON (command line: `--seek '{"context": 0.2}'`), or
            `true` / `false`. `None` and `false` turn it off: plain training.

    Raises:
        ValueError: a field of `seek` is unknown or outside its allowed set.
    """

    # the command line takes strings only, so the type is the one that HfArgumentParser can fill
    seek: str | None = field(
        default="true",
        metadata={"help": "TokenSeek's configuration as JSON, e.g. '{\"context\": 0.2}', or true / false."},
    )

    def __post_init__(self):
        self.seek = SeekConfig.parse(self.seek)
        super().__post_init__()

    def to_dict(self) -> dict[str, Any]:
        """As in [`~transformers.TrainingArguments`], with `seek` as a `dict`."""
        return {**super().to_dict(), "seek": None if self.seek is None else asdict(self.seek)}
