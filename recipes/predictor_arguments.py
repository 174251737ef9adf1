"""The options of `recipes/train_predictor.py`."""

from dataclasses import asdict, dataclass, field
from typing import Any

from hf_tokenseek.lemo import LemoConfig
from recipes.models import SMOLLM2

PYTHON_SOURCE = "python-source"


@dataclass
class PredictorArguments:
    """What to train, and on what.

    Args:
        output_dir (`str`):
            Folder that gets the predictor; a finished one in it is not overwritten.
        model (`str`, *optional*, defaults to `"smollm2"`):
            Name or path of a causal language model, or `"smollm2"` (see [`~recipes.models.load_smollm2`]).
        dataset (`str`, *optional*, defaults to `"python-source"`):
            The standard library's source, or whatever [`~recipes.records.load_records`] takes.
        seq_length (`int`, *optional*, defaults to 1024):
            Tokens of a sequence; of records at most.
        block, queries, rope (*optional*):
            As in [`LemoConfig`]; the predictor serves the same `block` and `queries` only.
        hidden (`list[int]`, *optional*, defaults to `[64, 256]`):
            Units of the two hidden states of each network.
        dim (`int`, *optional*, defaults to 32):
            Size of the vector that a block is turned into.
        steps (`int`, *optional*, defaults to 400):
            Updates of the predictor.
        batch_size (`int`, *optional*, defaults to 1):
            Sequences of an update.
        learning_rate (`float`, *optional*, defaults to 1e-3):
            Of Adam; falls to 0 on a straight line.
        prune_steps (`list[int]`, *optional*):
            Updates behind which units are removed; at a quarter, half and three quarters of `steps` if not given,
            never if it is 0.
        prune_shares (`list[float]`, *optional*, defaults to `[0.8, 0.75, 0.7]`):
            One for each of `prune_steps`: units go that were zero in at least this share of the blocks since the last.
        keep (`float`, *optional*, defaults to 0.4):
            Share of blocks that the recall is measured at.
        eval_sequences (`int`, *optional*, defaults to 8):
            Held-out sequences that it is measured on.
        save_steps (`int`, *optional*, defaults to 20):
            Every so many updates save what an interrupted training goes on from.
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            Show no bars.
        seed (`int`, *optional*, defaults to 0):
            Draws the first weights and the order of sequences.
    """

    output_dir: str = field(metadata={"help": "Folder that gets the predictor."})
    model: str = field(default=SMOLLM2, metadata={"help": f"Name or path of a causal model, or `{SMOLLM2}`."})
    dataset: str = field(
        default=PYTHON_SOURCE, metadata={"help": f"`{PYTHON_SOURCE}`, a JSONL file of records, or a hub data set."}
    )
    seq_length: int = field(default=1024, metadata={"help": "Tokens of a sequence; of records at most."})
    block: int = field(default=64, metadata={"help": "Tokens in a block."})
    queries: str = field(default="labelled", metadata={"help": "Whose look at a block counts, as in LemoConfig."})
    rope: bool = field(default=False, metadata={"help": "Whether the score to learn knows positions."})
    hidden: list[int] = field(default_factory=lambda: [64, 256], metadata={"help": "Units of the two hidden states."})
    dim: int = field(default=32, metadata={"help": "Size of the vector that a block is turned into."})
    steps: int = field(default=400, metadata={"help": "Updates of the predictor."})
    batch_size: int = field(default=1, metadata={"help": "Sequences of an update."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Of Adam; falls to 0 on a straight line."})
    prune_steps: list[int] | None = field(
        default=None, metadata={"help": "Updates behind which units are removed; three if not given, 0 for never."}
    )
    prune_shares: list[float] = field(
        default_factory=lambda: [0.8, 0.75, 0.7],
        metadata={"help": "For each of them: units go that were zero in at least this share of the blocks."},
    )
    keep: float = field(default=0.4, metadata={"help": "Share of blocks that the recall is measured at."})
    eval_sequences: int = field(default=8, metadata={"help": "Held-out sequences that it is measured on."})
    save_steps: int = field(default=20, metadata={"help": "Every so many updates save what to go on from."})
    disable_tqdm: bool = field(default=False, metadata={"help": "Show no bars."})
    seed: int = field(default=0, metadata={"help": "Draws the first weights and the order of sequences."})

    def __post_init__(self):
        for name in ("dim", "steps", "batch_size", "eval_sequences", "save_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} should be at least 1.")
        if len(self.hidden) != 2 or min(self.hidden) < 1:
            raise ValueError(f"hidden={self.hidden} should be the sizes of two hidden states, as --hidden 64 256.")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate={self.learning_rate} should be above 0.")
        if self.seq_length < 2 * self.block:
            raise ValueError(
                f"seq_length={self.seq_length} has no two blocks of block={self.block} to choose from. Set "
                f"--seq_length {2 * self.block} or more."
            )
        self.pruning()

    def score(self) -> LemoConfig:
        """The score to learn; raises `ValueError` where [`LemoConfig`] does."""
        return LemoConfig(keep=self.keep, block=self.block, queries=self.queries, rope=self.rope)

    def pruning(self) -> dict[int, float]:
        """Shares by update; raises `ValueError` if there is not one for each."""
        if self.prune_steps == [0]:
            return {}
        steps = [self.steps * part // 4 for part in (1, 2, 3)] if self.prune_steps is None else self.prune_steps
        if len(steps) != len(self.prune_shares) or not all(0 < share <= 1 for share in self.prune_shares):
            raise ValueError(
                f"prune_shares={self.prune_shares} should be {len(steps)} shares in (0, 1], one for each of "
                f"prune_steps={steps}. Give as many, or --prune_steps 0."
            )
        return dict(zip(steps, self.prune_shares, strict=True))

    def identity(self) -> dict[str, Any]:
        """The options that decide what becomes of a training."""
        silent = ("output_dir", "save_steps", "disable_tqdm")
        return {name: value for name, value in asdict(self).items() if name not in silent}
