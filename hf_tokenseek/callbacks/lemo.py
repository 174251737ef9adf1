"""LeMo in any `Trainer`, as a callback."""

from torch import nn

from ..lemo import LemoConfig
from ..lemo.attach import LemoHandle
from ..lemo.refusals import refuse_arguments
from ..patching import find_causal_lm
from .logging import LoggedMetrics


class LemoCallback(LoggedMetrics):
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

    def __init__(self, config: LemoConfig | dict | bool | None = None):
        self.config = LemoConfig() if config is None else LemoConfig.parse(config)
        if self.config is None:
            raise ValueError("LemoCallback was told to be off. Leave it out of `callbacks` instead.")
        self.handle: LemoHandle | None = None

    def attach(self, model: nn.Module) -> None:
        """Attaches LeMo to `model`, unless it is."""
        # `model_init` makes another model than the one that `__init__` has seen
        if self.handle is not None and self.handle.model is not find_causal_lm(model):
            self.detach()
        if self.handle is None:
            self.handle = LemoHandle(model, self.config)

    def detach(self) -> None:
        """Gives the model back as it was."""
        self.handle.undo()
        self.handle = None

    def on_init_end(self, args, state, control, model=None, **kwargs) -> None:
        refuse_arguments(args, self.config)
        self.attach(model)

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        self.attach(model)
        if state.is_local_process_zero:
            print(self.handle.swapped(), flush=True)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        # callbacks that come later have gone around trl's forward, or have attached TokenSeek, only now
        self.handle.resume()
        self.handle.begin_step(state.global_step)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.detach()

    def metrics(self, reset: bool = True) -> dict[str, float]:
        """
        The figures of [`~lemo.telemetry.Telemetry`] since the last call with `reset`.

        Args:
            reset (`bool`, *optional*, defaults to `True`): whether the next call starts from here.
        """
        return {} if self.handle is None else self.handle.telemetry.read(reset)
