"""What a step keeps, in closed form, for decoders of Llama's shape: a check on the simulation, and on the reader."""

from ..method_config import MethodConfig
from ..seek import SeekConfig
from ..seek.batch import Sizes
from ..seek.cost import Cost
from .training import Training

# RMS norms, gated MLP, grouped heads, nothing else that saves
LLAMA_LIKE = ("llama", "mistral", "qwen2")
METHODS = ("seek", "lean")


def saved_formula_bytes(config, training: Training) -> int | None:
    """
    Bytes that autograd has saved at the end of forward; `None` where there is no formula.

    With `k` of `n` rows trained, `w` bytes a number, hidden size `H`, query width `Q`, key width `K`, MLP width `I`,
    `L` layers, `h` heads and vocabulary `V`:

        a layer and row    2 (4 + 2w) H + 2w (Q + K) + 4w I + 4h      lean: 4w H + 2w (Q + K) + 2w I + 4h
        checkpointed       w H
        TokenSeek          keys and values of all rows: L n 2w K, among them those of the k rows
        head               (4 + 2w) H + 4V a row; with TokenSeek (4 + w) H a row, w H a loss row (lean: no 4, but w)

    Args:
        config (`transformers.PreTrainedConfig`): of the model.
        training ([`Training`]): how it is trained.
    """
    used = {name for name, value in training.methods.items() if value}
    if config.model_type not in LLAMA_LIKE or used - set(METHODS) or training.lora or training.dtype == "mixed":
        return None
    if training.model_state is not None or keeps_scores(config, training):
        return None
    seek, lean = SeekConfig.parse(training.methods.get("seek")), "lean" in used
    w, heads, layers = 2 if training.dtype == "bf16" else 4, config.num_attention_heads, config.num_hidden_layers
    hidden, inner = config.hidden_size, config.intermediate_size
    size = getattr(config, "head_dim", None) or hidden // heads
    query, key = heads * size, config.num_key_value_heads * size
    rows, loss_rows, selected = rows_of(training, seek)
    norm = 2 * w * hidden if lean else (4 + 2 * w) * hidden
    a_layer = 2 * norm + 2 * w * (query + key) + (2 if lean else 4) * w * inner + 4 * heads
    kept = rows * layers * (w * hidden if training.checkpointing else a_layer)
    if selected:
        others = training.batch * training.seq - (0 if training.checkpointing else rows)
        kept += others * layers * 2 * w * key
    if seek is None:
        return kept + rows * (norm + 4 * config.vocab_size)
    return kept + rows * (norm - w * hidden) + loss_rows * w * hidden


def keeps_scores(config, training: Training) -> bool:
    """
    Whether torch's attention keeps the scores of all pairs of tokens.

    On a GPU it has fused kernels of float32 only where each query head has its own key head.
    """
    text = config.get_text_config()
    grouped = getattr(text, "num_key_value_heads", None) not in (None, text.num_attention_heads)
    return grouped and training.dtype == "fp32" and training.device == "cuda"


def rows_of(training: Training, seek: MethodConfig | None) -> tuple[int, int, bool]:
    """Rows with a gradient, rows with a loss, and whether they were selected."""
    everything = training.batch * training.seq
    if seek is None:
        return everything, everything, False
    sizes = Sizes.plan([training.seq] * training.batch, [training.labels] * training.batch, True, seek.resolved())
    selected = sizes.rows / training.seq < Cost(3.0 + training.checkpointing).break_even or not seek.plain_fallback
    rows = training.batch * sizes.rows if selected else everything
    return rows, sum(sizes.loss), selected
