"""Which way of training fits, tried in an order of preference."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from .estimation import Estimate, estimate
from .peaks import GIB
from .training import Training

# left to what is not modelled
HEADROOM = 0.08

_LEAN, _CHUNKED, _SEEK = {"lean": True}, {"seek": {"context": 1.0}}, {"seek": True}
_VELORA = {"velora": {"groups": 32, "compressed_state": True}}
_IST = {"ist": {"layers": 0.25}}
_LEMO = {"lemo": True, **_CHUNKED}
_TILES = {"mlp_tiles": 8}


@dataclass(frozen=True)
class Way:
    """
    A way of training.

    Args:
        name (`str`): what the table calls it.
        exact (`bool`): whether the gradients are those of plain training.
        methods (`dict`): what [`attach`] takes.
        checkpointing (`bool`): gradient checkpointing.
    """

    name: str
    exact: bool
    methods: dict[str, Any]
    checkpointing: bool = False

    def of(self, training: Training) -> Training:
        """The same training, this way."""
        return replace(training, methods=self.methods, checkpointing=self.checkpointing)


# Exact before approximate, fast before slow, little changed before much. TokenSeek's default comes first among the
# approximate ones: docs/evidence has it at cosines of 0.92 and more with the full gradient, and at the same losses.
# LeMo (perplexity within 1 % of dense) changes the forward pass too, and saves where labels are everywhere.
# context=1.0 trains on all tokens, with head and loss in chunks.
WAYS = (
    Way("plain", True, {}),
    Way("lean", True, _LEAN),
    Way("chunked loss", True, _CHUNKED),
    Way("lean + chunked loss", True, {**_LEAN, **_CHUNKED}),
    Way("chunked loss + checkpointing", True, _CHUNKED, True),
    Way("lean + chunked loss + checkpointing", True, {**_LEAN, **_CHUNKED}, True),
    Way("lean + tiles + chunked loss + checkpointing", True, {**_LEAN, **_TILES, **_CHUNKED}, True),
    Way("seek", False, _SEEK),
    Way("seek + lean", False, {**_SEEK, **_LEAN}),
    Way("seek + checkpointing", False, _SEEK, True),
    Way("seek + lean + checkpointing", False, {**_SEEK, **_LEAN}, True),
    Way("seek + lean + tiles + checkpointing", False, {**_SEEK, **_LEAN, **_TILES}, True),
    Way("lemo + lean", False, {**_LEMO, **_LEAN}),
    Way("lemo + lean + checkpointing", False, {**_LEMO, **_LEAN}, True),
    Way("lemo + lean + tiles + checkpointing", False, {**_LEMO, **_LEAN, **_TILES}, True),
    Way("lemo + seek + lean + tiles + checkpointing", False, {**_LEMO, **_SEEK, **_LEAN, **_TILES}, True),
    Way("seek + lean + velora", False, {**_SEEK, **_LEAN, **_VELORA}),
    Way("seek + lean + velora + checkpointing", False, {**_SEEK, **_LEAN, **_VELORA}, True),
    Way("seek + lean + ist", False, {**_SEEK, **_LEAN, **_IST}),
    Way("seek + lean + ist + checkpointing", False, {**_SEEK, **_LEAN, **_IST}, True),
)


@dataclass(frozen=True)
class Tried:
    """
    A way, and what it would take.

    Args:
        way ([`Way`]): what was tried.
        training ([`Training`]): the same in full.
        estimate ([`Estimate`], *optional*): what it takes; `None` where it was refused.
        refusal (`str`): why, where it was.
        budget_bytes (`int`): what there is.
    """

    way: Way
    training: Training
    estimate: Estimate | None
    refusal: str
    budget_bytes: int

    @property
    def fits(self) -> bool:
        """Whether it can be simulated, and stays within the budget."""
        return self.estimate is not None and self.estimate.peak.bytes <= self.budget_bytes

    def __str__(self) -> str:
        kind = "exact" if self.way.exact else "approximate"
        if self.estimate is None:
            return f"{self.way.name:44} {kind:12} refused: {self.refusal}"
        verdict = "fits" if self.fits else "too much"
        return f"{self.way.name:44} {kind:12} {self.estimate.peak_gib:9.3f} GiB  {verdict}"


def budget_of(memory_bytes: int, headroom: float = HEADROOM) -> int:
    """
    Bytes of a device's memory that a plan may use.

    Raises:
        ValueError: `headroom` is no share in [0, 1).
    """
    if not 0 <= headroom < 1:
        raise ValueError(f"`headroom` should be a share in [0, 1), got {headroom}.")
    return round(memory_bytes * (1 - headroom))


def try_ways(config, training: Training, budget_bytes: int) -> Iterator[Tried]:
    """
    Tries one way after the other, each when it is asked for.

    What is trained stays as it is: all weights, or adapters of the given rank.

    Args:
        config (`transformers.PreTrainedConfig`): of the model.
        training ([`Training`]): without methods.
        budget_bytes (`int`): what the peak may be.
    """
    for way in WAYS:
        mine = way.of(training)
        try:
            yield Tried(way, mine, estimate(config, mine), "", budget_bytes)
        except ValueError as error:
            yield Tried(way, mine, None, str(error), budget_bytes)


def first_fitting(config, training: Training, budget_bytes: int, count: int = 1) -> list[Tried]:
    """The first so many ways that fit, arguments as in [`try_ways`]."""
    return list(islice((tried for tried in try_ways(config, training, budget_bytes) if tried.fits), count))


def recipe_options(training: Training, model: str | None = None) -> dict[str, Any]:
    """The same as options of `recipes/sft.py`; `model` is its name, if it is to be among them."""
    options: dict[str, Any] = {} if model is None else {"model": model}
    options |= {
        "max_length": training.seq,
        "per_device_train_batch_size": training.batch,
        "gradient_checkpointing": training.checkpointing,
        "optim": training.optimizer,
        "bf16": training.dtype == "mixed",
        "seek": training.methods.get("seek", False),
    }
    options |= {name: value for name, value in training.methods.items() if name != "seek"}
    if training.lora is not None:
        options |= {"use_peft": True, "lora_r": training.lora}
    if training.load_in_4bit:
        options["load_in_4bit"] = True
    return options


def parse_size(text: str) -> int:
    """
    Bytes of a size such as `24GiB`.

    Raises:
        ValueError: it is none.
    """
    units = {"GiB": GIB, "MiB": 2**20, "GB": 10**9, "MB": 10**6}
    for unit, factor in units.items():
        number = text.removesuffix(unit).strip()
        if text.endswith(unit) and number.replace(".", "", 1).isdigit():
            return round(float(number) * factor)
    raise ValueError(f"A size should be a number and one of {list(units)}, such as 24GiB, got {text!r}.")
