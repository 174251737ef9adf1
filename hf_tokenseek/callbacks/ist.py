"""Sparse tuning in any `Trainer`, as a callback."""

from transformers.utils import logging

from ..ist import IstConfig
from ..ist.attach import IstHandle
from ..ist.refusals import prepare_arguments
from .stateful import StatefulCallback

logger = logging.get_logger(__name__)


class IstCallback(StatefulCallback):
    """
    Trains a few layers at a time in any `Trainer`: IST, LISA and relatives.

    ```python
    trainer = Trainer(model, args, train_dataset=dataset, callbacks=[IstCallback(IstConfig(layers=0.25))])
    ```

    Layers change at the beginning of an optimizer step. Each checkpoint gets a file `ist.pt` (importance, active
    layers, history, offloaded state), from which a resumed run goes on exactly. Logs `ist/lowest_layer`,
    `ist/gradient_predicted_mib`, `ist/optimizer_predicted_mib` (of AdamW), `ist/optimizer_mib` and `ist/probe_share`;
    when training ends, the layers' importance and who trained when are printed.

    Args:
        config ([`IstConfig`], `dict` or `bool`, *optional*): how many layers and which; defaults to `IstConfig()`.

    Raises:
        ValueError: the model or a training argument is not supported, by name.
    """

    config_type, handle_type, state_file, method = IstConfig, IstHandle, "ist.pt", "sparse tuning"

    def on_init_end(self, args, state, control, model=None, **kwargs) -> None:
        prepare_arguments(args, self.config)
        self.attach(model)

    def accept(self, optimizer) -> None:
        """The handle looks after its state from now on; raises as [`IstHandle.manage`] does."""
        self.handle.manage(optimizer)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        draws = len(self.handle.history)
        self.handle.begin_step(state.global_step)
        if len(self.handle.history) > draws:
            logger.info(f"Layers {self.handle.active} train from step {state.global_step} on.")

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        self.handle.observe_gradients()

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if state.is_local_process_zero:
            print(self.handle.report(), flush=True)
        super().on_train_end(args, state, control, **kwargs)

    def metrics(self, reset: bool = True) -> dict[str, float]:
        """
        What trains now and what it takes, and what learning has cost since the last call with `reset`.

        Args:
            reset (`bool`, *optional*, defaults to `True`): whether the next call starts from here.
        """
        return {} if self.handle is None else self.handle.metrics(reset)
