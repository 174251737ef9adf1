"""One micro-batch: what the model's forward was given, how it is trained, and what its loss is divided by."""

import torch
from torch import Tensor

from ..families import POSITIONS_FROM_MASK
from ..memory.phases import phase
from ..seeds import mixed_seed
from .batch import IGNORE, Batch, Sizes, prepare
from .config import SeekConfig
from .cost import is_checkpointed
from .heads import FusedHead, LossHead
from .metrics import Trained
from .passes import Decoder, hold
from .scores import SCORE_FUNCTIONS
from .select import Selection, real_rows, select

# Arguments of a decoder's forward that TokenSeek reads itself.
PER_TOKEN = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "cu_seq_lens_q")
READ = (*PER_TOKEN, "labels", "num_items_in_batch")
# Arguments that say nothing about the loss, or repeat what is read above.
HARMLESS = ("use_cache", "return_dict", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def read(inputs: dict, config: SeekConfig, family: str, sizes: Sizes | None = None) -> tuple[Batch, dict]:
    """
    The micro-batch, and what the plain backbone takes of it.

    Args:
        inputs (`dict`): what the model's forward was given, by name.
        config ([`SeekConfig`]): the shares to apply.
        family (`str`): the model's `model_type`.
        sizes ([`Sizes`], *optional*): planned beforehand.

    Raises:
        ValueError: there are no labels, or an argument that TokenSeek cannot select rows of.
    """
    if inputs.get("labels") is None:
        raise ValueError(
            "TokenSeek needs `labels` in the model's inputs while training. Label smoothing and compute_loss_func "
            "take them away: set label_smoothing_factor=0 and compute_loss_func=None, or undo() TokenSeek."
        )
    unknown = [k for k, v in inputs.items() if k not in READ + HARMLESS and not _is_off(v)]
    if unknown:
        raise ValueError(f"TokenSeek cannot select rows of the arguments {unknown}. It reads {list(READ)}.")
    batch = prepare(
        config,
        inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"],
        inputs["labels"],
        inputs.get("attention_mask"),
        inputs.get("position_ids"),
        inputs.get("cu_seq_lens_q"),
        positions_from_mask=family in POSITIONS_FROM_MASK,
        sizes=sizes,
    )
    return batch, {k: inputs[k] for k in (*PER_TOKEN, *HARMLESS[2:]) if inputs.get(k) is not None}


def train_plainly(decoder: Decoder, batch: Batch, plain_inputs: dict, head: LossHead | FusedHead) -> Trained:
    """Forward with gradient of every row, as without TokenSeek; the loss is a sum."""
    rows = torch.arange(batch.shape[1], device=batch.targets.device).expand(batch.shape)
    hidden = decoder.plain({**plain_inputs, **batch.lemo_inputs})
    everything, batch = batch, batch.computed()
    weights = None if batch.lemo is None else _standing_for(everything, batch).expand(batch.shape)
    loss = head(hidden, rows, batch.targets, weights, sum(batch.sizes.labelled))
    # reported as every selection: without padding, empty slots behind the real ones
    real = real_rows(batch)
    order = (real < 0).to(torch.int8).sort(stable=True).indices
    weights = torch.ones(batch.shape, device=real.device)
    everything = Selection(real.gather(1, order), batch.targets.gather(1, order), weights)
    return Trained(loss, everything, plainly=True)


def train_selected(
    decoder: Decoder, batch: Batch, config: SeekConfig, head: LossHead | FusedHead, *place: int
) -> Trained:
    """Scouts, scores, selects, runs the selected rows with gradient; `place` in the run seeds all that is random."""
    generator = torch.Generator().manual_seed(mixed_seed(config.seed, *place))
    score = SCORE_FUNCTIONS[config.score]
    with phase("scout"):
        scouted, found = decoder.scout(batch, score, config)
    with phase("select"):
        candidates = batch.computed()
        scores = score.compute(found, candidates, config, generator)
        selection = select(scores, candidates, config, generator)
    hidden = decoder.ditch(batch, scouted, selection)
    if is_checkpointed(decoder.model):
        hidden = hold(hidden, scouted)
    weights = selection.weights * _standing_for(batch, candidates)
    loss = head(hidden, selection.rows, selection.targets, weights, sum(batch.sizes.loss))
    return Trained(loss, selection, found, scores, kept_bytes=scouted.nbytes)


def _standing_for(batch: Batch, computed: Batch) -> Tensor | float:
    """How many labels each label stands for whose token no layer has left out."""
    if batch.lemo is None:
        return 1.0
    labelled, left = ((part.targets != IGNORE).sum() for part in (batch, computed))
    return labelled / left.clamp(min=1)


def count_items(items: Tensor | int | None, batch: Batch) -> Tensor | int:
    """What the summed loss is divided by: the Trainer's count over the step, else this micro-batch's labels."""
    if items is None:
        return max(1, sum(batch.sizes.labelled))
    return items.clamp(min=1) if isinstance(items, Tensor) else max(1, items)


def _is_off(value) -> bool:
    return value is None or (isinstance(value, (bool, int)) and not value)
