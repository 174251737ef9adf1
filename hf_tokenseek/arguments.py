"""Training arguments with one field a method."""

from dataclasses import asdict, dataclass, field
from typing import Any

from transformers import TrainingArguments

from .seek import SeekConfig


@dataclass
class MethodArguments:
    """
    The fields of all methods, to be put before [`~transformers.TrainingArguments`] or a subclass of it.

    Args:
        seek ([`SeekConfig`], `dict` or `str`, *optional*, defaults to `"true"`):
            TokenSeek's configuration: a config, its fields, their JSON (command line: `--seek '{"context": 0.2}'`), or
            `true` / `false`. `None` and `false` turn it off: plain training.
        lean (`bool`, *optional*, defaults to `False`):
            Swap norms, MLPs and LoRA layers for exact ones that save less for backward.

    Raises:
        ValueError: a field of `seek` is unknown or outside its allowed set.
    """

    # the command line takes strings only, so the type is the one that HfArgumentParser can fill
    seek: str | None = field(
        default="true",
        metadata={"help": "TokenSeek's configuration as JSON, e.g. '{\"context\": 0.2}', or true / false."},
    )

    lean: bool = field(
        default=False,
        metadata={"help": "Swap norms, MLPs and LoRA layers for exact ones that save less for backward."},
    )

    def __post_init__(self):
        self.seek = SeekConfig.parse(self.seek)
        super().__post_init__()

    def to_dict(self) -> dict[str, Any]:
        """As in [`~transformers.TrainingArguments`], with `seek` as a `dict`."""
        return {**super().to_dict(), "seek": None if self.seek is None else asdict(self.seek)}


@dataclass
class TokenSeekArguments(MethodArguments, TrainingArguments):
    """
    [`~transformers.TrainingArguments`] with the fields of [`MethodArguments`].

    > Parameters that control token selection

    Args:
        seek ([`SeekConfig`], `dict` or `str`, *optional*, defaults to `"true"`):
            TokenSeek's configuration; `None` and `false` turn it off.
        lean (`bool`, *optional*, defaults to `False`):
            Swap norms, MLPs and LoRA layers for exact ones that save less for backward.

    Raises:
        ValueError: a field of `seek` is unknown or outside its allowed set.
    """
