"""LeMo in any `Trainer`, as a callback."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from torch import nn
from transformers import TrainingArguments

from ..lemo import LemoConfig
from ..lemo.attach import LemoHandle
from ..lemo.predictor import copy_predictor
from ..lemo.refusals import refuse_arguments
from .method import MethodCallback

# of the data set, whose longest sequence is what bytes are predicted for
ROWS_READ = 1000


class LemoCallback(MethodCallback):
    """
    Trains with LeMo in any `Trainer`: layers run on the blocks of tokens that matter.

    ```python
    trainer = Trainer(model, args, train_dataset=dataset, callbacks=[LemoCallback(LemoConfig(keep=0.4))])
    ```

    The model is patched when the trainer is built and given back when training ends; evaluation, generation and saving
    see the original. Choices follow from the seed and the step, so that a resumed run goes on exactly. Logs the keys
    of [`~lemo.telemetry.Telemetry`].

    Args:
        config ([`LemoConfig`], `dict` or `bool`, *optional*): what to keep; defaults to `LemoConfig()`.

    Raises:
        ValueError: the model or a training argument is not supported, by name.
    """

    config_type, handle_type = LemoConfig, LemoHandle

    def __init__(self, config: LemoConfig | dict | bool | None = None):
        super().__init__(config)
        self._described = False

    def on_init_end(self, args, state, control, model=None, **kwargs) -> None:
        refuse_arguments(args, self.config)
        self.attach(model)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self._described = False

    def on_epoch_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs) -> None:
        # not before: callbacks that come later attach when training begins; not after: some track steps
        if not self._described and state.is_local_process_zero:
            self.handle.resume()
            print(predict(model, args, train_dataloader), flush=True)
        self._described = True

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        # callbacks that come later have gone around trl's forward, or have attached TokenSeek, only now
        self.handle.resume()
        self.handle.begin_step(state.global_step)

    def on_save(self, args, state, control, **kwargs) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.config.predictor is not None and args.should_save and folder.is_dir():
            copy_predictor(self.config.predictor, folder)

    def metrics(self, reset: bool = True) -> dict[str, float]:
        """
        The figures of [`~lemo.telemetry.Telemetry`] since the last call with `reset`.

        Args:
            reset (`bool`, *optional*, defaults to `True`): whether the next call starts from here.
        """
        return {} if self.handle is None else self.handle.telemetry.read(reset)


def predict(model: nn.Module, args: TrainingArguments, dataloader) -> str:
    """What each layer will keep for the backward pass, with the model's LeMo and without, in lines for the table."""
    from ..memory.estimation import estimate_saved_layers
    from ..memory.run import attached_methods, config_of, largest_training

    try:
        training = largest_training(model, args, dataloader.dataset, ROWS_READ)
        mine = attached_methods(model)
        plain = {name: value for name, value in mine.items() if name != "lemo"}
        sizes = [
            estimate_saved_layers(config_of(model), replace(training, methods=methods)) for methods in (plain, mine)
        ]
    # whatever it is: a table must not stop a run that could train
    except Exception as error:
        return f"  bytes of layers cannot be predicted: {error}"
    count = model.config.get_text_config().num_hidden_layers
    before, after = ([found.get(layer, 0) / 2**20 for layer in range(count)] for found in sizes)
    lines = [f"  kept for backward at {training.batch} x {training.seq} tokens, all labelled, simulated:"]
    lines += [f"  layers {f'{first} to {last}':10} {mib} MiB each" for first, last, mib in runs_of(before, after)]
    return "\n".join([*lines, f"  in all     {sum(before):.4g} -> {sum(after):.4g} MiB"])


def runs_of(before: list[float], after: list[float]) -> Iterator[tuple[int, int, str]]:
    """Neighbouring layers of which the same is to be said: `(first, last, what)`."""
    said = [f"{old:.4g} -> {new:.4g}" for old, new in zip(before, after, strict=True)]
    for what, run in groupby(enumerate(said), key=lambda item: item[1]):
        numbers = [number for number, _ in run]
        yield numbers[0], numbers[-1], what
