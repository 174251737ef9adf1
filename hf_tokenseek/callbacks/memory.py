"""Memory and speed of training, in the log."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import logging

from ..memory import SavedActivations, other_hooks_active
from ..memory.watch import LEVELS, StepWatch
from ..patched_forward import PatchedForward
from .logging import LoggedMetrics

logger = logging.get_logger(__name__)

MIB = 2**20
# what counting one saved tensor costs on one slow core, forward and backward, and the share of the time it may cost
SECONDS_PER_TENSOR, SHARE_OF_TIME = 13e-6, 0.02


class MemoryCallback(LoggedMetrics):
    """
    Logs what training costs, with any `Trainer`:

    - `memory/saved_activations_mib`: what autograd kept for backward at the end of the model's forward, without
      parameters and buffers; the largest micro-batch since the last log. Does not see a loss computed elsewhere.
    - `memory/peak_mib`: peak of allocated memory since the last log, where the device counts it (not on the CPU).
    - `speed/step_seconds`: mean time from the beginning of a step to its end, accumulation and optimizer included,
      data loading and evaluation not. The first step of the run is left out where there is another.
    - `speed/tokens_per_second`: real tokens (by the attention mask) of this process in the same time.

    ```python
    trainer = Trainer(model, args, train_dataset=dataset, callbacks=[MemoryCallback()])
    ```

    For trackers to see them in a stock `Trainer` too, set `report_to=[]` and list the tracker's callback behind this
    one ([`LoggedMetrics`]).

    With `level="layer"` the first three optimizer steps are tracked operator by operator ([`MemoryTracker`]): such a
    step takes about 40 us an operator longer (0.3 s with 30 layers) and is left out of `speed/...`. The log after one
    has, of the largest moment so far, `memory/tracked_peak_mib` and its parts
    `memory/{parameters,gradients,optimizer,activations,temporaries}_mib` and `memory/layer_{i}_mib`, and
    `memory/{forward,scout,select,backward,step}_peak_mib`. Beside it, on a GPU, stand the allocator's
    `memory/allocated_mib` (now), `memory/reserved_mib` (now) and `memory/peak_reserved_mib`.
    With `level="snapshot"` these steps are also recorded by PyTorch's CUDA allocator, and written to
    `memory_snapshot.pickle` in `output_dir` for https://pytorch.org/memory_viz.

    The model's `forward` is wrapped from the beginning to the end of training, on the instance; evaluation and
    generation do not notice. To stay below 2 % of the time, counting pauses after a micro-batch in proportion to its
    saved tensors (0.75 s after the 1,153 of a 30-layer Llama): faster micro-batches are sampled, with at least the
    first one in every log. Only the log waits for the device.

    Saved activations are not counted, and the key is missing, under `torch.compile`, while other hooks move saved
    tensors (activation offloading), with DeepSpeed ZeRO-3 and with `torch.nn.DataParallel` (the last two warn, and
    count no tokens either). The peak is read from and reset in PyTorch's one counter per device: other readers of it,
    `skip_memory_metrics=False` among them, see the peak since the last log only.

    Args:
        level (`str`, *optional*, defaults to `"step"`): how closely to look: `"step"`, `"layer"` or `"snapshot"`.

    Attributes:
        watch ([`StepWatch`], *optional*): of the present or last run, if it is looked at closely.
        labels (`torch.Tensor`, *optional*): of the last micro-batch of the step that runs.

    Raises:
        ValueError: `level` is unknown, or a run cannot be looked at that closely.
    """

    def __init__(self, level: str = "step"):
        if level not in LEVELS:
            raise ValueError(f"`level` should be one of {list(LEVELS)}, got {level!r}.")
        self.level = level
        self.watch: StepWatch | None = None
        self.labels: Tensor | None = None
        self._window = _Window()
        self._forward: PatchedForward | None = None
        self._device = torch.device("cpu")
        self._tokens: int | Tensor = 0

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        # a run that ended in an exception has left its wrapper behind
        self.stop()
        self._window, self._device = _Window(), args.device
        self.watch = None if self.level == "step" else StepWatch(self.level, args)
        self._reset_peak()
        reason = _why_not_wrapped(args)
        if reason is None:
            self._wrap(model)
        else:
            logger.warning(f"MemoryCallback counts neither saved activations nor tokens: {reason}")

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        # a callback behind this one may have gone around the forward when training began
        if self._forward is not None and model is not None and model.forward is not self._forward.forward:
            self._unwrap()
            self._wrap(model)
        self._tokens = 0
        if self.watch is not None:
            self.watch.begin_step(model, optimizer)
        self._step_began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        seconds, self.labels = time.perf_counter() - self._step_began, None
        # tracking takes its time, which is not the step's
        if self.watch is not None and self.watch.end_step():
            self._window.tracked = True
        else:
            self._window.steps.append((seconds, self._tokens))

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.stop()

    def stop(self) -> None:
        """Gives the model back as it was, also in the middle of a step that has failed."""
        self._unwrap()
        if self.watch is not None:
            self.watch.close()

    @property
    def layer_mib(self) -> dict[str, list[float]]:
        """MiB of each decoder layer at the largest tracked moment, by name; empty where nothing is tracked."""
        if self.watch is None or not self.watch.peaks:
            return {}
        sizes = [size / MIB for layer, size in self.watch.peak.layers.items() if layer is not None]
        return {"memory at the peak": sizes} if sizes else {}

    def metrics(self, reset: bool = True) -> dict[str, float]:
        """
        The figures since the last call with `reset`; those that could not be measured are missing.

        Args:
            reset (`bool`, *optional*, defaults to `True`):
                Whether the next call starts from here.

        Returns:
            `dict[str, float]`: By the keys listed above.
        """
        window, metrics = self._window, {}
        if window.saved_bytes is not None:
            metrics["memory/saved_activations_mib"] = window.saved_bytes / MIB
        if (device := _counting_device(self._device)) is not None:
            metrics["memory/peak_mib"] = device.max_memory_allocated(self._device) / MIB
        steps = window.steps[1:] if window.warming_up and len(window.steps) > 1 else window.steps
        if steps:
            seconds = sum(seconds for seconds, _ in steps)
            metrics["speed/step_seconds"] = seconds / len(steps)
            if tokens := float(sum(tokens for _, tokens in steps)):
                metrics["speed/tokens_per_second"] = tokens / seconds
        if window.tracked:
            metrics |= self.watch.metrics()
        if reset:
            self._window = _Window(warming_up=window.warming_up and not window.steps)
            self._reset_peak()
        return metrics

    def _measure(self, forward: Callable, args: tuple, kwargs: dict) -> Any:
        self._tokens = self._tokens + _count_tokens(**kwargs)
        window, self.labels = self._window, kwargs.get("labels")
        if self.watch is not None and self.watch.tracker is not None:
            # its hooks are set already
            output = forward(*args, **kwargs)
            window.saved_bytes = max(window.saved_bytes or 0, self.watch.tracker.saved.bytes)
            return output
        if torch.compiler.is_compiling() or time.perf_counter() < window.pause_until or other_hooks_active():
            return forward(*args, **kwargs)
        with self._saved:
            output = forward(*args, **kwargs)
        window.saved_bytes = max(window.saved_bytes or 0, self._saved.bytes)
        window.pause_until = time.perf_counter() + self._saved.tensors * SECONDS_PER_TENSOR / SHARE_OF_TIME
        return output

    def _wrap(self, model: nn.Module) -> None:
        self._saved = SavedActivations(model)
        self._forward = PatchedForward(model, self._measure)

    def _unwrap(self) -> None:
        if self._forward is not None:
            self._forward.undo()
            self._forward = self._saved = None

    def _reset_peak(self) -> None:
        if (device := _counting_device(self._device)) is not None:
            device.reset_peak_memory_stats(self._device)


@dataclass
class _Window:
    """What has been measured since the last log; a run's first window begins with its warm-up step."""

    warming_up: bool = True
    saved_bytes: int | None = None
    steps: list[tuple[float, int | Tensor]] = field(default_factory=list)
    tracked: bool = False
    pause_until: float = 0.0


def _count_tokens(input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **_: Any) -> int | Tensor:
    """Real tokens of a batch, left on its device."""
    if attention_mask is not None and attention_mask.dim() == 2:
        return attention_mask.sum()
    return 0 if input_ids is None else input_ids.numel()


def _counting_device(device: torch.device) -> Any:
    """The device's module, e.g. `torch.cuda`, if it counts allocations."""
    module = torch.get_device_module(device)
    return module if hasattr(module, "max_memory_allocated") else None


def _why_not_wrapped(args: TrainingArguments) -> str | None:
    if args.n_gpu > 1:
        return (
            f"torch.nn.DataParallel (n_gpu={args.n_gpu}) copies the wrapped forward to each replica with the first "
            "one's weights. Start the run with `torchrun`, or show it one GPU by CUDA_VISIBLE_DEVICES."
        )
    if is_deepspeed_zero3_enabled():
        return (
            "counting would keep the weights that DeepSpeed ZeRO-3 gathers alive until backward. Use ZeRO-2 or FSDP, "
            "or go without these figures."
        )
    return None
