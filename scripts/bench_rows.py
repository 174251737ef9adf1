"""The ways of training that `bench_step` and `bench_memory` compare, as rows of one table."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from hf_tokenseek import SeekConfig, attach
from hf_tokenseek.seek.batch import IGNORE, Sizes
from tokenseek_kernels import linear_cross_entropy


@dataclass(frozen=True)
class Row:
    """
    One way of training.

    Args:
        name (`str`): what the table calls it.
        checkpointing (`bool`): gradient checkpointing, not reentrant.
        chunked_loss (`bool`): head and loss in chunks of rows; otherwise the model's own loss over all logits.
        seek ([`SeekConfig`], *optional*): TokenSeek's configuration.
        lean (`bool`): lean layers.
        labelled (`float`): share of the tokens that are labels, at the end of each sequence; 1 labels everything.
    """

    name: str
    checkpointing: bool = False
    chunked_loss: bool = False
    seek: SeekConfig | None = None
    lean: bool = False
    labelled: float = 1.0


PLAIN = Row("plain")
CHUNKED = Row("plain + chunked loss", chunked_loss=True)
CHECKPOINTING = Row("checkpointing", checkpointing=True)
CHECKPOINTING_CHUNKED = Row("checkpointing + chunked loss", checkpointing=True, chunked_loss=True)
LEAN, LEAN_CHUNKED = Row("lean", lean=True), Row("lean + chunked loss", lean=True, chunked_loss=True)
# what bench_step compares TokenSeek with
BASELINES = (PLAIN, CHECKPOINTING, CHECKPOINTING_CHUNKED, LEAN)
SEEK_10, SEEK_10_CHECKPOINTING = "seek ratio 0.1", "seek ratio 0.1 + checkpointing"
SEEK_10_LEAN = "seek ratio 0.1 + lean"


def seek_rows(score: str) -> tuple[Row, ...]:
    """TokenSeek's rows; `score` selects where a ratio is given."""
    tenth = SeekConfig(ratio=0.1, score=score)
    return (
        Row(SEEK_10, seek=tenth),
        Row("seek ratio 0.3", seek=SeekConfig(ratio=0.3, score=score)),
        Row("seek default, 5 % labels", seek=SeekConfig(), labelled=0.05),
        Row(SEEK_10_CHECKPOINTING, checkpointing=True, seek=tenth),
        Row(SEEK_10_LEAN, seek=tenth, lean=True),
    )


@contextmanager
def prepared(model: nn.Module, row: Row) -> Iterator[None]:
    """The model as the row trains it, for the time of the block."""
    with ExitStack() as undo:
        if row.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            undo.callback(model.gradient_checkpointing_disable)
        if row.seek is not None or row.lean:
            undo.enter_context(attach(model, seek=row.seek, lean=row.lean))
        yield


def label(ids: Tensor, share: float) -> Tensor:
    """Labels on the last `share` of each sequence, -100 before."""
    labels = ids.clone()
    labels[:, : ids.shape[1] - math.ceil(share * ids.shape[1])] = IGNORE
    return labels


def planned_sizes(row: Row, ids: Tensor) -> Sizes:
    """What TokenSeek would count in the labels of [`label`]; fake labels hold no numbers to count."""
    batch, n = ids.shape
    # the first token is predicted by none
    targets = min(n - 1, math.ceil(row.labelled * n))
    return Sizes.plan([n] * batch, [targets] * batch, simple=True, config=row.seek)


def forward_loss(model: nn.Module, row: Row, ids: Tensor, labels: Tensor, planned: bool = False) -> Tensor:
    """
    The mean loss of a micro-batch, the row's way; `backward()` is left to the caller.

    Args:
        model (`transformers.PreTrainedModel`): inside [`prepared`].
        row ([`Row`]): how to train.
        ids, labels (`torch.LongTensor` of shape `(batch, n)`): the micro-batch.
        planned (`bool`, *optional*, defaults to `False`): hand TokenSeek's sizes over instead of having labels read.
    """
    if row.chunked_loss:
        hidden = model.base_model(input_ids=ids, use_cache=False)[0].flatten(0, 1)
        targets = F.pad(labels, (0, 1), value=IGNORE)[:, 1:].flatten()
        losses = linear_cross_entropy(hidden, model.get_output_embeddings().weight, targets)
        return losses.sum() / (targets != IGNORE).sum()
    sizes = {"seek_sizes": planned_sizes(row, ids)} if row.seek is not None and planned else {}
    return model(input_ids=ids, labels=labels, **sizes).loss
