"""How the figures of a callback enter the training log."""

from transformers import TrainerCallback


class LoggedMetrics(TrainerCallback):
    """
    Base of the callbacks that have figures to log.

    With the plain `Trainer` they are added to each training log (one that has a `loss`) and to its entry in
    `state.log_history`, hence `trainer_state.json`. `Trainer` calls its callbacks in the order in which it knows them,
    and those of `report_to` come first: the progress bar shows the figures, but such a tracker has seen the log
    before. With `report_to=[]` and the tracker's callback behind ours it sees them:

    ```python
    Trainer(model, args, callbacks=[SeekCallback(), MemoryCallback(), TensorBoardCallback()], ...)
    ```

    A trainer that adds `metrics()` to the log itself, before anyone has seen it, sets `logged_by_trainer`.

    Attributes:
        logged_by_trainer (`bool`): Whether the trainer calls `metrics()`. `False` by default.
    """

    logged_by_trainer = False

    def metrics(self, reset: bool = True) -> dict[str, float]:
        """The figures since the last call with `reset`; those that could not be measured are missing."""
        raise NotImplementedError

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if self.logged_by_trainer or "loss" not in (logs or {}):
            return
        metrics = self.metrics()
        logs.update(metrics)
        # the trainer has stored a copy of `logs` before it calls its callbacks
        state.log_history[-1].update(metrics)
