"""TokenSeek in any `Trainer`, as a callback."""

from dataclasses import asdict, replace

from torch import nn
from transformers import TrainerState, TrainingArguments
from transformers.utils import logging

from ..patching import find_causal_lm
from ..seek import SeekConfig
from ..seek.attach import SeekHandle
from ..seek.config import AUTO
from ..seek.ranks import refuse_strategies
from ..seek.trl import refuse_trl_arguments
from .logging import LoggedMetrics
from .ownership import disown, is_owner, own, take_over

logger = logging.get_logger(__name__)

# after so many a warning is not about a few odd sequences
MICRO_BATCHES = 10


class SeekCallback(LoggedMetrics):
    """
    Trains with TokenSeek in a stock `Trainer`: scouts, scores, selects and ditches inside the model's forward.

    ```python
    trainer = Trainer(model, args, train_dataset=dataset, callbacks=[SeekCallback(SeekConfig(context=0.2))])
    ```

    The model is patched when the trainer is built (before accelerate wraps it) and given back when training ends;
    evaluation, generation and saving see the original. Logs the keys of [`SeekMetrics`]; for trackers to see them in a
    stock `Trainer` too, set `report_to=[]` and list the tracker's callback behind this one ([`LoggedMetrics`]).

    Args:
        config ([`SeekConfig`], `dict` or `bool`, *optional*): what to select; defaults to `SeekConfig()`.

    Raises:
        ValueError: the model or a training argument is not supported, by name.
    """

    def __init__(self, config: SeekConfig | dict | bool | None = None):
        self.config = SeekConfig() if config is None else SeekConfig.parse(config)
        if self.config is None:
            raise ValueError("SeekCallback was told to be off. Leave it out of `callbacks` instead.")
        self.handle: SeekHandle | None = None
        self._described = self._warned = False

    def on_init_end(self, args, state, control, model=None, **kwargs) -> None:
        refuse_arguments(args)
        refuse_trl_arguments(args, self.config, model)
        refuse_strategies(args, self.config)
        self._attach(model)

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs) -> None:
        if self.handle is None:
            # it was added to a trainer that had been built
            self.on_init_end(args, state, control, model=model)
        # `model_init` may have made another model, trl has replaced the forward of this one
        self._attach(model)
        if self.config.ratio == AUTO:
            self.handle.config = replace(
                self.handle.config, ratio=find_ratio(self.config, model, args, train_dataloader)
            )
        self._described = self._warned = False
        if state.is_local_process_zero:
            print(self.handle.swapped(), flush=True)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.handle.begin_step(state.global_step)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if not self._described and state.is_local_process_zero:
            print("TokenSeek's first step:", *self.handle.metrics.describe(), sep="\n", flush=True)
        self._described = True
        if self.handle.metrics.total >= MICRO_BATCHES:
            self._warn(state)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.detach()
        self._warn(state)

    def detach(self) -> None:
        """Gives the model back as it was; the handle keeps its figures, and what was selected."""
        if self.handle is not None:
            disown(self.handle.model, self.handle)

    def metrics(self, reset: bool = True) -> dict[str, float]:
        """
        The means of [`SeekMetrics`] since the last call with `reset`.

        Args:
            reset (`bool`, *optional*, defaults to `True`): whether the next call starts from here.
        """
        return {} if self.handle is None else self.handle.metrics.read(reset)

    def _warn(self, state: TrainerState) -> None:
        """Says once in a run that TokenSeek does not fit the data, if it does not."""
        misfit = self.handle.metrics.misfit()
        if misfit is not None and not self._warned and state.is_local_process_zero:
            logger.warning(misfit)
            self._warned = True

    def _attach(self, model: nn.Module) -> None:
        inner = find_causal_lm(model)
        if self.handle is not None and self.handle.model is not inner:
            self.detach()
            self.handle = None
        if self.handle is None or not is_owner(inner, self.handle):
            take_over(inner, SeekHandle)
        if self.handle is None:
            # until training begins and tells what there is to train on
            config = replace(self.config, ratio=1.0, budget_gib=None) if self.config.ratio == AUTO else self.config
            self.handle = SeekHandle(model, config)
        self.handle.resume()
        own(inner, self.handle)


def find_ratio(config: SeekConfig, model: nn.Module, args: TrainingArguments, dataloader) -> float:
    """
    The largest share of tokens that memory affords, for the longest sequences of the data.

    Methods count that are on the model or that the arguments name; others can only make it less.

    Raises:
        ValueError: nothing fits, or the run cannot be simulated.
    """
    from ..memory.budget import affordable_ratio
    from ..memory.plan import budget_of
    from ..memory.run import attached_methods, config_of, largest_training, memory_bytes, methods_of

    total = memory_bytes(args.device) if config.budget_gib is None else round(config.budget_gib * 2**30)
    try:
        # callbacks that come later may not have attached yet to a model that has just been made
        methods = {**methods_of(args), **attached_methods(model), "seek": {**asdict(config), "budget_gib": None}}
        training = largest_training(model, args, dataloader.dataset)
        return affordable_ratio(config_of(model), replace(training, methods=methods), budget_of(total))
    except (ValueError, ModuleNotFoundError) as error:
        raise ValueError(f"ratio={AUTO!r} cannot be found: {error} Or set a number.") from error


def refuse_arguments(args: TrainingArguments) -> None:
    """
    Refuses training arguments under which TokenSeek would silently not run, or run wrong.

    Raises:
        ValueError: names the argument, its value and the next step.
    """
    refusals = {
        "label_smoothing_factor": (args.label_smoothing_factor, "0.0", "its loss takes the labels from the model"),
        "neftune_noise_alpha": (
            args.neftune_noise_alpha,
            "None",
            "scouting would see no noise, and selected rows another one than in whole sequences",
        ),
        "torch_compile": (args.torch_compile, "False", "the selected forward would run uncompiled"),
        "use_liger_kernel": (
            args.use_liger_kernel,
            "False",
            "its fused loss takes the model's forward; TokenSeek never holds all logits, and lean=True has the layers",
        ),
    }
    for name, (value, allowed, why) in refusals.items():
        if value:
            raise ValueError(f"TokenSeek does not support `{name}`={value}: {why}. Set {name}={allowed}.")
