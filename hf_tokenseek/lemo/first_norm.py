"""A layer's rows and what its first norm makes of them, in one kernel where lean layers know what that is."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from tokenseek_kernels import split_normed_rows, split_rows

from ..lean.norms import eps_of, rms_rule_of
from ..parameters import is_partitioned
from ..patched_forward import replaced_forward

NAME = "input_layernorm"


@contextmanager
def split_for(layer: nn.Module, hidden: Tensor, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """
    [`split_rows`] for a call of `layer` inside the block, whose first norm then has its answer.

    Args:
        layer (`nn.Module`): the decoder layer.
        hidden (`torch.Tensor` of shape `(batch, n, width)`): its input.
        rows (`torch.LongTensor` of shape `(batch, k)`): the rows it is to be called with.
    """
    norm = getattr(layer, NAME, None)
    if not _is_known(norm) or getattr(layer, "gradient_checkpointing", False):
        yield split_rows(hidden, rows)
        return
    weight = getattr(norm, "weight", None)
    rest, kept, normed = split_normed_rows(hidden, rows, weight, eps_of(norm), **rms_rule_of(norm))
    own = norm.forward

    def answer(hidden_states: Tensor) -> Tensor:
        # some layers have something in front of the norm
        return normed if hidden_states is kept else own(hidden_states)

    with replaced_forward(norm, answer):
        yield rest, kept


def _is_known(norm: nn.Module | None) -> bool:
    """Whether the norm is a lean one whose weight is here, and which nobody else has an eye on."""
    if norm is None or rms_rule_of(norm) is None or "forward" in vars(norm):
        return False
    return getattr(norm, "velora_input", None) is None and not any(map(is_partitioned, norm.parameters()))
