"""The largest share of the tokens that a memory budget affords."""

from bisect import bisect_right
from dataclasses import replace

from .estimation import estimate
from .peaks import GIB
from .training import Training

RATIOS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6)


def affordable_ratio(config, training: Training, budget_bytes: int) -> float:
    """
    The largest `ratio` of TokenSeek whose training step stays within the budget: exact 1.0, or one of [`RATIOS`].

    Args:
        config (`transformers.PreTrainedConfig`): of the model.
        training ([`Training`]): of the largest micro-batch; `methods["seek"]` holds the other fields of `SeekConfig`.
        budget_bytes (`int`): what the peak may be.

    Raises:
        ValueError: nothing fits, or the training cannot be simulated.
    """
    peaks: dict[float, int] = {}

    def peak_bytes(ratio: float) -> int:
        methods = {**training.methods, "seek": {**training.methods.get("seek", {}), "ratio": ratio}}
        peaks[ratio] = estimate(config, replace(training, methods=methods)).peak.bytes
        return peaks[ratio]

    # apart from the others: a step that trains on all tokens keeps no second set of keys and values
    if peak_bytes(1.0) <= budget_bytes:
        return 1.0
    fitting = bisect_right(RATIOS, budget_bytes, key=peak_bytes)
    if fitting == 0:
        raise ValueError(
            f"{training.batch} x {training.seq} tokens take {min(peaks.values()) / GIB:.2f} GiB even with the "
            f"smallest ratio, {RATIOS[0]}, and there are {budget_bytes / GIB:.2f}. Train fewer tokens at a time, turn "
            "gradient checkpointing or lean=True on, or run `hf-tokenseek fit`."
        )
    return RATIOS[fitting - 1]
