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
from ..patching import PatchedForward
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

    The model's `forward` is wrapped from the beginning to the end of training, on the instance; evaluation and
    generation do not notice. To stay below 2 % of the time, counting pauses after a micro-batch in proportion to its
    saved tensors (0.75 s after the 1,153 of a 30-layer Llama): faster micro-batches are sampled, with at least the
    first one in every log. Only the log waits for the device.

    Saved activations are not counted, and the key is missing, under `torch.compile`, while other hooks move saved
    tensors (activation offloading), with DeepSpeed ZeRO-3 and with `torch.nn.DataParallel` (the last two warn, and
    count no tokens either). The peak is read from and reset in PyTorch's one counter per device: other readers of it,
    `skip_memory_metrics=False` among them, see the peak since the last log only.
    """

    def __init__(self):
        self._window = _Window()
        self._forward: PatchedForward | None = None
        self._device = torch.device("cpu")
        self._tokens: int | Tensor = 0

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        # a run that ended in an exception has left its wrapper behind
        self._unwrap()
        self._window, self._device = _Window(), args.device
        self._reset_peak()
        reason = _why_not_wrapped(args)
        if reason is None:
            self._wrap(model)
        else:
            logger.warning(f"MemoryCallback counts neither saved activations nor tokens: {reason}")

    def on_step_begin(self, args, state, control, model=None, **kwargs) -> None:
        # a callback behind this one may have gone around the forward when training began
        if self._forward is not None and model is not None and model.forward is not self._forward.forward:
            self._unwrap()
            self._wrap(model)
        self._tokens = 0
        self._step_began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self._window.steps.append((time.perf_counter() - self._step_began, self._tokens))

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self._unwrap()

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
        if reset:
            self._window = _Window(warming_up=window.warming_up and not window.steps)
            self._reset_peak()
        return metrics

    def _measure(self, forward: Callable, args: tuple, kwargs: dict) -> Any:
        self._tokens = self._tokens + _count_tokens(**kwargs)
        window = self._window
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
