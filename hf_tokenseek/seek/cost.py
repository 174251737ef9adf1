"""What a step costs, by formula, in units of one forward pass over the whole micro-batch."""

from dataclasses import dataclass

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper

from ..parameters import trained_share


@dataclass(frozen=True)
class Cost:
    """
    Predicted cost of training a micro-batch.

    Plain training costs a forward, a backward for the activations (1) and one for the trained weights (their share of
    all weights), and with gradient checkpointing one more forward. TokenSeek costs one scouting forward and the plain
    cost of the selected share of rows.

    Args:
        plain (`float`): cost of plain training in forwards: 3, with checkpointing 4, with a small adapter about 2.
    """

    plain: float

    @classmethod
    def of(cls, model: nn.Module) -> "Cost":
        """Reads what is trained, and whether it is checkpointed, off the model."""
        return cls(2.0 + trained_share(model) + is_checkpointed(model))

    @property
    def break_even(self) -> float:
        """Share of rows at which scouting stops to pay: 2/3, checkpointed 3/4, with a small adapter about 1/2."""
        return 1 - 1 / self.plain

    def seek(self, share: float) -> float:
        """Cost in forwards of scouting and of training the share `share` of all rows."""
        return 1 + share * self.plain


def is_checkpointed(model: nn.Module) -> bool:
    """
    Whether gradient checkpointing is on: layers and old-style decoders carry the same flag, and FSDP's own
    checkpointing wraps layers.
    """
    return any(
        getattr(module, "gradient_checkpointing", False) or isinstance(module, CheckpointWrapper)
        for module in model.modules()
    )
