"""What a user can choose about VeLoRA."""

from dataclasses import dataclass, field
from numbers import Integral

from ..method_config import MethodConfig

INPUTS = ("attention", "mlp", "down")
PROJECTORS = ("average", "random", "mixed")
MOMENTS = ("transport", "reset")


@dataclass
class VeloraConfig(MethodConfig):
    """
    Configuration of VeLoRA: which inputs of linear layers are kept as a few numbers a token, and how.

    An input is cut into `groups` sub-tokens; of each, its scalar product with a direction is kept. Output and input
    gradient stay exact, the weight gradient is projected on the directions. As many groups as the input is wide equal
    plain training. Method: [VeLoRA](https://huggingface.co/papers/2405.17991); random complements as in PRAC
    (arXiv 2602.23111); the compressed optimizer state is this library's.

    Args:
        groups (`int`, *optional*, defaults to 32):
            Sub-tokens an input is cut into, at most its width. More keep more of the gradient and save less.
        inputs (`tuple[str, ...]`, *optional*, defaults to `("attention", "mlp", "down")`):
            Whose inputs: `"attention"` (query, key and value projection), `"mlp"` (gate and up), `"down"`. An input is
            kept whole as long as one layer that reads it keeps it, so all of its trained readers are taken together.
        projector (`str`, *optional*, defaults to `"average"`):
            Directions: `"average"` (of the first batch's sub-tokens, the paper's), `"random"` (unbiased: `rank` random
            ones) or `"mixed"` (unbiased: the average, and `rank - 1` random ones orthogonal to it).
        rank (`int`, *optional*):
            Directions a group: 1 for `"average"`; defaults to 1, for `"mixed"` to 2.
        refresh_steps (`int`, *optional*):
            Every so many optimizer steps directions are drawn again; 0 is never. Defaults to 0 for `"average"`, to 1
            for the others, which are unbiased only if they change.
        compressed_state (`bool`, *optional*, defaults to `False`):
            Keep gradients and AdamW's moments of these layers compressed as well: the same update, `width / groups`
            times smaller. Needs `projector="average"` and AdamW.
        moments (`str`, *optional*, defaults to `"transport"`):
            With `compressed_state`, what becomes of the moments when directions change: `"transport"` or `"reset"`.
        probe_steps (`int`, *optional*, defaults to 0):
            Every so many optimizer steps, measure how much of the inputs' energy and of the gradients is kept (one
            micro-batch keeps its inputs for it). 0 turns it off.
        force (`bool`, *optional*, defaults to `False`):
            Go on where an input is kept whole by a layer that cannot be compressed, so that nothing is saved.
        seed (`int`, *optional*, defaults to 0):
            Seed of random directions.

    Raises:
        ValueError: a value lies outside its allowed set, or two do not fit together.
    """

    field_name, example = "velora", '{"groups": 32}'

    groups: int = field(default=32, metadata={"help": "Sub-tokens an input is cut into."})
    inputs: tuple[str, ...] = field(default=INPUTS, metadata={"help": f"Inputs to compress: {', '.join(INPUTS)}."})
    projector: str = field(default="average", metadata={"help": f"Directions: {', '.join(PROJECTORS)}."})
    rank: int | None = field(default=None, metadata={"help": "Directions a group."})
    refresh_steps: int | None = field(default=None, metadata={"help": "Draw directions again every so many steps."})
    compressed_state: bool = field(default=False, metadata={"help": "Compress gradients and AdamW's moments, too."})
    moments: str = field(default="transport", metadata={"help": "Moments of old directions: transport or reset."})
    probe_steps: int = field(default=0, metadata={"help": "Measure fidelity every so many steps; 0 is off."})
    force: bool = field(default=False, metadata={"help": "Go on where nothing is saved."})
    seed: int = field(default=0, metadata={"help": "Seed of random directions."})

    def __post_init__(self):
        self._check_kind(Integral, "whole number", "groups", "rank", "refresh_steps", "probe_steps", "seed")
        self._check_allowed("projector", PROJECTORS)
        self._check_allowed("moments", MOMENTS)
        # JSON has lists only
        self.inputs = (self.inputs,) if isinstance(self.inputs, str) else tuple(self.inputs)
        if not self.inputs or set(self.inputs) - set(INPUTS):
            raise ValueError(f"`inputs` should be some of {list(INPUTS)}, got {list(self.inputs)}.")
        average = self.projector == "average"
        if self.rank is None:
            self.rank = 2 if self.projector == "mixed" else 1
        if self.refresh_steps is None:
            self.refresh_steps = 0 if average else 1
        for name, lowest in (("groups", 1), ("rank", 1), ("refresh_steps", 0), ("probe_steps", 0)):
            if getattr(self, name) < lowest:
                raise ValueError(f"`{name}` should be at least {lowest}, got {getattr(self, name)}.")
        self._check_combinations(average)

    def _check_combinations(self, average: bool) -> None:
        if average and self.rank != 1:
            raise ValueError(f"projector='average' has rank=1, got {self.rank}. Use projector='mixed' for more.")
        if self.projector == "mixed" and self.rank < 2:
            raise ValueError(f"projector='mixed' needs a rank of at least 2, got {self.rank}.")
        if not average and not self.refresh_steps:
            raise ValueError(
                f"projector={self.projector!r} needs `refresh_steps` of at least 1, got 0: random directions are "
                "unbiased only if they change."
            )
        if self.compressed_state and not average:
            raise ValueError(
                f"compressed_state=True needs projector='average', got {self.projector!r}: moments of gradients along "
                "changing directions do not add up. Set compressed_state=False."
            )
