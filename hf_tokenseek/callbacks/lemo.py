"""LeMo in any `Trainer`, as a callback."""

from ..lemo import LemoConfig
from ..lemo.attach import LemoHandle
from ..lemo.refusals import refuse_arguments
from .method import MethodCallback


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

    def on_init_end(self, args, state, control, model=None, **kwargs) -> None:
        refuse_arguments(args, self.config)
        self.attach(model)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        # callbacks that come later have gone around trl's forward, or have attached TokenSeek, only now
        self.handle.resume()
        self.handle.begin_step(state.global_step)

    def metrics(self, reset: bool = True) -> dict[str, float]:
        """
        The figures of [`~lemo.telemetry.Telemetry`] since the last call with `reset`.

        Args:
            reset (`bool`, *optional*, defaults to `True`): whether the next call starts from here.
        """
        return {} if self.handle is None else self.handle.telemetry.read(reset)
