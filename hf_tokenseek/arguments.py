"""Training arguments with one field a method."""

from dataclasses import asdict, dataclass, field
from typing import Any

from transformers import TrainingArguments

from .ist import IstConfig
from .lean import check_tiles
from .lemo import LemoConfig
from .method_config import MethodConfig
from .seek import SeekConfig
from .velora import VeloraConfig


@dataclass
class MethodArguments:
    """
    The fields of all methods, to be put before [`~transformers.TrainingArguments`] or a subclass of it.

    Args:
        seek ([`SeekConfig`], `dict` or `str`, *optional*, defaults to `"true"`):
            TokenSeek's configuration: a config, its fields, their JSON (command line: `--seek '{"context": 0.2}'`), or
            `true` / `false`. `None` and `false` turn it off: plain training.
        velora ([`VeloraConfig`], `dict` or `str`, *optional*, defaults to `"false"`):
            VeLoRA's configuration, likewise; off by default.
        ist ([`IstConfig`], `dict` or `str`, *optional*, defaults to `"false"`):
            Sparse tuning's configuration, likewise; off by default.
        lemo ([`LemoConfig`], `dict` or `str`, *optional*, defaults to `"false"`):
            LeMo's configuration, likewise; off by default.
        lean (`bool`, *optional*, defaults to `False`):
            Swap norms, MLPs and LoRA layers for exact ones that save less for backward.
        mlp_tiles (`int`, *optional*, defaults to 1):
            With `lean`: tiles of rows that each MLP is computed in, one after the other, and again in backward; for
            sequences of many thousands of tokens.

    Raises:
        ValueError: a field of a configuration is unknown or outside its allowed set, or `mlp_tiles` has no effect.
    """

    # the command line takes strings only, so the type is the one that HfArgumentParser can fill
    seek: str | None = field(
        default="true",
        metadata={"help": "TokenSeek's configuration as JSON, e.g. '{\"context\": 0.2}', or true / false."},
    )

    velora: str | None = field(
        default="false",
        metadata={"help": "VeLoRA's configuration as JSON, e.g. '{\"groups\": 32}', or true / false."},
    )

    ist: str | None = field(
        default="false",
        metadata={"help": "Sparse tuning's configuration as JSON, e.g. '{\"layers\": 0.25}', or true / false."},
    )

    lemo: str | None = field(
        default="false",
        metadata={"help": "LeMo's configuration as JSON, e.g. '{\"keep\": 0.4}', or true / false."},
    )

    lean: bool = field(
        default=False,
        metadata={"help": "Swap norms, MLPs and LoRA layers for exact ones that save less for backward."},
    )

    mlp_tiles: int = field(
        default=1,
        metadata={"help": "With lean: tiles of rows that each MLP is computed in, and again in backward."},
    )

    def __post_init__(self):
        self.seek, self.velora = SeekConfig.parse(self.seek), VeloraConfig.parse(self.velora)
        self.ist, self.lemo = IstConfig.parse(self.ist), LemoConfig.parse(self.lemo)
        neurons = self.lemo is not None and self.lemo.mlp == "neurons"
        check_tiles(self.mlp_tiles, self.lean, self.velora is not None, neurons)
        super().__post_init__()

    def to_dict(self) -> dict[str, Any]:
        """As in [`~transformers.TrainingArguments`], with the methods' configurations as `dict`s."""
        own = {name: value for name, value in vars(self).items() if isinstance(value, MethodConfig)}
        return {**super().to_dict(), **{name: asdict(value) for name, value in own.items()}}


@dataclass
class TokenSeekArguments(MethodArguments, TrainingArguments):
    """
    [`~transformers.TrainingArguments`] with the fields of [`MethodArguments`].

    > Parameters that control token selection

    Args:
        seek ([`SeekConfig`], `dict` or `str`, *optional*, defaults to `"true"`):
            TokenSeek's configuration; `None` and `false` turn it off.
        velora ([`VeloraConfig`], `dict` or `str`, *optional*, defaults to `"false"`):
            VeLoRA's configuration, likewise; off by default.
        ist ([`IstConfig`], `dict` or `str`, *optional*, defaults to `"false"`):
            Sparse tuning's configuration, likewise; off by default.
        lemo ([`LemoConfig`], `dict` or `str`, *optional*, defaults to `"false"`):
            LeMo's configuration, likewise; off by default.
        lean (`bool`, *optional*, defaults to `False`):
            Swap norms, MLPs and LoRA layers for exact ones that save less for backward.
        mlp_tiles (`int`, *optional*, defaults to 1):
            With `lean`: tiles of rows that each MLP is computed in, one after the other, and again in backward; for
            sequences of many thousands of tokens.

    Raises:
        ValueError: a field of a configuration is unknown or outside its allowed set.
    """
