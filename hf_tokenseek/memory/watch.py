"""The first steps of a training run, looked at closely."""

from pathlib import Path

import torch
from torch import nn
from transformers import TrainingArguments

from .peaks import KINDS, Peak
from .tracker import MemoryTracker

MIB = 2**20
LEVELS = ("step", "layer", "snapshot")
# the first, without the optimizer's state; the second, with it; and one more
TRACKED_STEPS = 3
SNAPSHOT_FILE, SNAPSHOT_EVENTS = "memory_snapshot.pickle", 1_000_000


class StepWatch:
    """
    Tracks the first steps of a run by [`MemoryTracker`], and has CUDA's allocator record them.

    Args:
        level (`str`): `"layer"` tracks, `"snapshot"` records as well.
        args (`transformers.TrainingArguments`): of the run.

    Attributes:
        tracker ([`MemoryTracker`], *optional*): at work, or else `None`.
        peaks (`dict[str, Peak]`): the largest moment of each phase of the steps that have been tracked.

    Raises:
        ValueError: the run cannot be looked at that closely.
    """

    def __init__(self, level: str, args: TrainingArguments):
        self.level, self.device = level, args.device
        self.tracker: MemoryTracker | None = None
        self.peaks: dict[str, Peak] = {}
        self._left = TRACKED_STEPS
        self._file = Path(args.output_dir) / SNAPSHOT_FILE
        check_level(level, args)
        if level == "snapshot":
            torch.cuda.memory._record_memory_history(max_entries=SNAPSHOT_EVENTS)

    def begin_step(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        """Tracks what comes until [`end_step`], if the step is one of the first."""
        if self._left:
            self._left -= 1
            self.tracker = MemoryTracker(model, optimizer=optimizer).__enter__()

    def end_step(self) -> bool:
        """Takes the tracker off; whether there was one."""
        tracker, self.tracker = self.tracker, None
        if tracker is None:
            return False
        tracker.__exit__(None, None, None)
        self._take(tracker)
        if not self._left:
            self._write_snapshot()
        return True

    def close(self) -> None:
        """Ends what is still going on, also after a step that has failed."""
        if self.tracker is not None:
            self._left = 0
            self.end_step()
        self._write_snapshot()

    def metrics(self) -> dict[str, float]:
        """The largest moment so far, by kind and layer; the phases; beside them the allocator's own figures."""
        if not self.peaks:
            return {}
        peak, found = self.peak, {}
        found["memory/tracked_peak_mib"] = peak.bytes / MIB
        found |= {f"memory/{kind}_mib": peak.kinds[kind] / MIB for kind in KINDS}
        found |= {f"memory/{name}_peak_mib": phase.bytes / MIB for name, phase in self.peaks.items()}
        found |= {f"memory/layer_{i}_mib": size / MIB for i, size in peak.layers.items() if i is not None}
        if self.device.type == "cuda":
            found["memory/allocated_mib"] = torch.cuda.memory_allocated(self.device) / MIB
            found["memory/reserved_mib"] = torch.cuda.memory_reserved(self.device) / MIB
            found["memory/peak_reserved_mib"] = torch.cuda.max_memory_reserved(self.device) / MIB
        return found

    @property
    def peak(self) -> Peak:
        """The largest moment of all."""
        return max(self.peaks.values(), key=lambda peak: peak.bytes)

    def _take(self, tracker: MemoryTracker) -> None:
        for name, peak in tracker.peaks.items():
            if name not in self.peaks or peak.bytes > self.peaks[name].bytes:
                self.peaks[name] = peak

    def _write_snapshot(self) -> None:
        if self.level == "snapshot":
            self.level = "layer"
            self._file.parent.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(self._file))
            torch.cuda.memory._record_memory_history(enabled=None)


def check_level(level: str, args: TrainingArguments) -> None:
    """
    Refuses a level that the run does not admit.

    Raises:
        ValueError: names the reason and the next step.
    """
    if level == "snapshot" and args.device.type != "cuda":
        raise ValueError(
            f"level='snapshot' records CUDA's allocator, and the run is on {args.device.type!r}. Use level='layer'."
        )
    # plain parameters and plain operators only
    reasons = {"fsdp": args.fsdp, "deepspeed": args.deepspeed, "torch_compile": args.torch_compile}
    named = [name for name, value in reasons.items() if value]
    named += ["torch.nn.DataParallel"] if args.n_gpu > 1 else []
    if named:
        raise ValueError(
            f"level={level!r} follows a model's own parameters and operators, which {' and '.join(named)} replaces. "
            "Use level='step'; `hf-tokenseek estimate` has the breakdown by arithmetic."
        )
