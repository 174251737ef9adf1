"""What a run did, recorded while it runs and made a page when it ends."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from torch import nn
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.utils import logging

from ..ist.attach import IstHandle
from ..method_config import MethodConfig
from ..report import require_extra
from ..report.describe import describe_run
from ..report.record import Event, RecordFile
from ..report.statistics import added
from ..seek.attach import SeekHandle
from ..seek.batch import Batch
from ..seek.metrics import Trained
from ..seek.watch import PositionHistogram, SampleWatch, Visit
from .ist import IstCallback
from .lean import LeanCallback
from .seek import SeekCallback

logger = logging.get_logger(__name__)


class ReportCallback(TrainerCallback):
    """
    Records what a run does in `report.jsonl`, and writes `report.html` when it ends, both in `output_dir`.

    ```python
    trainer = TokenSeekTrainer(model, args, train_dataset=dataset, callbacks=[ReportCallback()])
    trainer = Trainer(model, args, train_dataset=dataset, callbacks=[seek := SeekCallback(), ReportCallback([seek])])
    ```

    The record has the Trainer's log, the configuration, where the selected tokens stand, what became of each token of
    the first few sequences whenever they were trained on, which layers IST trained and which blocks LeMo kept. It is
    appended to at each log, evaluation, checkpoint and end of an epoch; a resumed run takes out what comes after its
    checkpoint and goes on. `hf-tokenseek report` makes a page of it at any time, also while the run goes on. Any
    callback with a `handle.kept_blocks` (a list a layer: how many sequences of the last micro-batch kept each block)
    or a `layer_mib` (lists of MiB by layer, by name) has them recorded.

    Cost: with TokenSeek about 80 small operations on the device a micro-batch (4 ms of one CPU core for 8 x 2048
    tokens) and 32 bytes a token of a followed sequence there, without it none; some 25 bytes a token in the file each
    time such a sequence is trained on. The device is waited for only when the file is appended to. The page takes a
    few seconds at the end. Of several processes the first one records, what it sees.

    Args:
        methods (`Sequence[TrainerCallback]`, *optional*):
            The callbacks of the methods to report. [`TokenSeekTrainer`] hands over its own.
        samples (`int`, *optional*, defaults to 8):
            How many sequences to follow token by token: the first that are trained on.

    Raises:
        ValueError: `samples` is negative.
        ModuleNotFoundError: `jinja2` or `matplotlib` is missing.
    """

    def __init__(self, methods: Sequence[TrainerCallback] = (), samples: int = 8):
        if samples < 0:
            raise ValueError(f"`samples` should be 0 (none) or a number of sequences, got {samples}.")
        require_extra()
        self.methods, self.samples = methods, samples
        self._file: RecordFile | None = None
        self._observed: SeekHandle | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._file, self._ended = None, False

    def on_step_begin(self, args, state, control, model=None, processing_class=None, **kwargs) -> None:
        if not state.is_world_process_zero:
            return
        if self._file is None:
            # not earlier: the other callbacks read their states and attach when training begins, in any order
            self._begin(args, state, model, processing_class)
        # those of the last step, to which every callback has added its figures by now
        self._write_logs(state)
        self._step = state.global_step + 1

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if control.should_log or control.should_save or control.should_evaluate:
            self._write_found(state.global_step, tables=control.should_save)

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        self._write_found(state.global_step, tables=True)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if self._file is None:
            return
        # what was found has been written at the end of the last epoch: other callbacks may have detached by now
        self._observe(None)
        self._ended = True
        self._finish(args, state)

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        # what is evaluated after training belongs to the run
        if self._file is not None and self._ended:
            self._finish(args, state)

    def _begin(self, args: TrainingArguments, state: TrainerState, model: nn.Module, processing_class) -> None:
        self._file = RecordFile(args.output_dir)
        kept = self._file.read_until(state.global_step) if state.global_step else []
        samples = [event["ids"] for event in kept if event["kind"] == "sample"]
        self._numbers = {tuple(ids): number for number, ids in enumerate(samples)}
        self._drawn = max((event["step"] for event in kept if event["kind"] == "draw"), default=0)
        self._kept = next((event["values"] for event in reversed(kept) if event["kind"] == "grid"), [])
        self._kept_until, self._logged = state.global_step, 0
        # a processor of several modalities has a tokenizer
        self._tokenizer = getattr(processing_class, "tokenizer", processing_class)
        self._watch, self._histogram = SampleWatch(self.samples, samples), PositionHistogram()
        self._file.begin([describe_run(args, model, self._configurations()), *kept])
        self._observe(next((c.handle for c in self.methods if isinstance(c, SeekCallback)), None))

    def _configurations(self) -> dict[str, dict | bool | int]:
        found = {}
        for callback in self.methods:
            # a handle has the defaults filled in that depend on the model
            config = getattr(getattr(callback, "handle", None), "config", None) or getattr(callback, "config", None)
            if isinstance(config, MethodConfig):
                found[config.field_name] = asdict(config)
            elif isinstance(callback, LeanCallback):
                found |= callback.settings
        return found

    def _observe(self, handle: SeekHandle | None) -> None:
        if self._observed is not None:
            self._observed.observers.remove(self._look)
        if handle is not None:
            handle.observers.append(self._look)
        self._observed = handle

    def _look(self, batch: Batch, done: Trained) -> None:
        if self.samples:
            self._watch.observe(batch, done, self._step)
        self._histogram.observe(batch, done)

    def _write_logs(self, state: TrainerState) -> None:
        entries = state.log_history[self._logged :]
        self._logged += len(entries)
        self._file.append({"kind": "log", "step": entry["step"], "entry": entry} for entry in entries)

    def _write_found(self, step: int, tables: bool) -> None:
        """
        Reads what has been left on the device and in the methods' handles since the last time; `tables`, of which only
        the latest is shown, are too large for every log.
        """
        if self._file is None:
            return
        events = [event for visit in self._watch.read() for event in self._visited(visit)]
        if (counts := self._histogram.read()) is not None:
            events.append({"kind": "positions", "step": step, **counts})
        for callback in self.methods:
            handle = getattr(callback, "handle", None)
            if isinstance(callback, IstCallback):
                events += self._draws(handle)
            if step > self._kept_until:
                self._kept = added(self._kept, getattr(handle, "kept_blocks", None) or [])
            if tables:
                events += _by_layer(callback, step)
        # the end of an epoch comes behind the log of its last step
        self._kept_until = step
        if tables and self._kept:
            events.append({"kind": "grid", "step": step, "name": "kept blocks", "values": self._kept})
        self._file.append(events)

    def _visited(self, visit: Visit) -> Iterator[Event]:
        ids = tuple(visit.tokens)
        if ids not in self._numbers:
            self._numbers[ids] = len(self._numbers)
            texts = [self._text(token) for token in ids]
            yield {"kind": "sample", "step": visit.step, "sample": self._numbers[ids], "ids": ids, "texts": texts}
        found = {"kinds": "".join(map(str, visit.kinds)), "scores": visit.scores, "terms": visit.terms}
        yield {"kind": "visit", "step": visit.step, "sample": self._numbers[ids], **found}

    def _text(self, token: int) -> str:
        return f"#{token}" if self._tokenizer is None else self._tokenizer.decode([token])

    def _draws(self, handle: IstHandle) -> Iterator[Event]:
        # drawn before the optimizer step with the next number
        new = [(step + 1, layers) for step, layers in handle.history if step + 1 > self._drawn]
        for step, layers in new:
            self._drawn = step
            yield {"kind": "draw", "step": step, "layers": layers, "of": len(handle.layers)}

    def _finish(self, args: TrainingArguments, state: TrainerState) -> None:
        """Writes the last logs and the page."""
        from ..report.page import PAGE, write_page

        self._write_logs(state)
        try:
            write_page([args.output_dir], Path(args.output_dir) / PAGE)
        except Exception as error:  # the model is not saved yet, and worth more than its report
            logger.warning(
                f"{PAGE} could not be written ({type(error).__name__}: {error}). The record in {args.output_dir} is "
                f"whole: try `hf-tokenseek report {args.output_dir}`."
            )


def _by_layer(callback: TrainerCallback, step: int) -> Iterator[Event]:
    for name, values in (getattr(callback, "layer_mib", None) or {}).items():
        yield {"kind": "layers", "step": step, "name": name, "values": values}
