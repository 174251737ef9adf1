"""`Trainer` with TokenSeek inside."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

from transformers import Trainer

from .callbacks import (
    IstCallback,
    LeanCallback,
    LemoCallback,
    LoggedMetrics,
    MemoryCallback,
    ReportCallback,
    SeekCallback,
    StatefulCallback,
    VeloraCallback,
)
from .callbacks.out_of_memory import explained_out_of_memory
from .callbacks.ownership import Attaching
from .ist.zero import group_by_layer
from .lemo.predictor import copy_predictor
from .method_config import MethodConfig
from .model_card import write_model_card
from .seek import SeekConfig
from .velora.optimizer import velora_adamw


@contextmanager
def _given_back(callbacks: list) -> Iterator[None]:
    """If what happens inside of the block fails, or is interrupted, the model is as it was before."""
    try:
        yield
    except BaseException:
        _detach(callbacks)
        raise


def _detach(callbacks: Iterable) -> None:
    for callback in callbacks:
        if isinstance(callback, (SeekCallback, Attaching)):
            callback.detach()


def _add(callbacks: list, kind: type, config: MethodConfig) -> None:
    """Adds a method's callback, unless the user has; refuses two configurations that say different things."""
    given = next((c for c in callbacks if isinstance(c, kind)), None)
    if given is None:
        callbacks.append(kind(config))
    # the defaults of the arguments are nobody's wish
    elif config not in (given.config, type(config)()):
        raise ValueError(
            f"The training arguments have {config.field_name}={config}, and {kind.__name__} has {given.config}. Leave "
            "one of them out."
        )


class TokenSeekMixin:
    """Adds the callbacks that the arguments ask for, and brings their figures into every log."""

    def __init__(self, model=None, args=None, *positional, callbacks=None, compute_loss_func=None, **kwargs):
        # `Trainer` takes classes too
        callbacks = [c() if isinstance(c, type) else c for c in callbacks or []]
        # plain TrainingArguments have no such field: seek is on with its defaults
        seek = getattr(args, "seek", SeekConfig())
        if seek is not None and compute_loss_func is not None:
            raise ValueError(
                "TokenSeek computes the loss inside the model and does not support `compute_loss_func`. Leave it out, "
                "or set seek=None."
            )
        if seek is not None:
            _add(callbacks, SeekCallback, seek)
        if getattr(args, "lean", False) and not any(isinstance(c, LeanCallback) for c in callbacks):
            callbacks.append(LeanCallback(args.mlp_tiles))
        for name, kind in (("velora", VeloraCallback), ("ist", IstCallback), ("lemo", LemoCallback)):
            if getattr(args, name, None) is not None:
                _add(callbacks, kind, getattr(args, name))
        if not any(isinstance(c, MemoryCallback) for c in callbacks):
            callbacks.append(MemoryCallback())
        with _given_back(callbacks):
            super().__init__(
                model, args, *positional, callbacks=callbacks, compute_loss_func=compute_loss_func, **kwargs
            )
        for callback in self.callback_handler.callbacks:
            # trl's trainers replace the model's forward when Trainer's own __init__, and so attaching, is done
            if isinstance(callback, (SeekCallback, VeloraCallback, LemoCallback)):
                callback.handle.resume()
        for callback in self._logged():
            callback.logged_by_trainer = True
        report = self._callback(ReportCallback)
        if report is not None:
            report.methods = self.callback_handler.callbacks

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Adds the callbacks' figures to training logs, so that every tracker and `trainer_state.json` has them."""
        if "loss" in logs:
            for callback in self._logged():
                logs.update(callback.metrics())
        super().log(logs, *args, **kwargs)

    def create_optimizer(self, *args, **kwargs):
        """The optimizer that the arguments name, as the methods need it."""
        velora = self._callback(VeloraCallback)
        if velora is not None and velora.config.compressed_state:
            # `model_init` has made another model since
            velora.attach(self.model)
            if self.optimizer_cls_and_kwargs is None:
                self.optimizer_cls_and_kwargs = self._velora_adamw(velora.config.moments)
        optimizer = super().create_optimizer(*args, **kwargs)
        ist = self._callback(IstCallback)
        if ist is not None and self.is_deepspeed_enabled:
            ist.attach(self.model)
            group_by_layer(optimizer, ist.handle.layers)
        return optimizer

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As in [`~transformers.Trainer`]; the methods' states come from where the run is resumed from."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, StatefulCallback):
                # `True` is the last checkpoint in `output_dir`, which the callback finds
                callback.checkpoint = None if isinstance(resume_from_checkpoint, bool) else resume_from_checkpoint
        with (
            _given_back(self.callback_handler.callbacks),
            explained_out_of_memory(self._callback(MemoryCallback), self.model, self.args),
        ):
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def pop_callback(self, callback):
        """As in [`~transformers.Trainer`]; a method goes with its callback."""
        popped = super().pop_callback(callback)
        _detach([popped])
        return popped

    def remove_callback(self, callback) -> None:
        """As in [`~transformers.Trainer`]; a method goes with its callback."""
        self.pop_callback(callback)

    def create_model_card(self, *args, **kwargs) -> None:
        """As in the trainer below; the card says how the weights were trained as well."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            self._write_methods(self.args.output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Saves as ever, LeMo's predictor beside it, and says in the model card how the weights were trained."""
        super()._save(output_dir, state_dict)
        folder = output_dir or self.args.output_dir
        self._write_methods(folder)
        lemo = self._callback(LemoCallback)
        if lemo is not None and lemo.config.predictor is not None:
            copy_predictor(lemo.config.predictor, folder)

    def _write_methods(self, folder: str) -> None:
        seek, velora = self._callback(SeekCallback), self._callback(VeloraCallback)
        ist, lemo = self._callback(IstCallback), self._callback(LemoCallback)
        lean = self._callback(LeanCallback)
        methods = {
            "seek": None if seek is None else asdict(seek.handle.config),
            "velora": None if velora is None else asdict(velora.config),
            "ist": None if ist is None else asdict(ist.config),
            "lemo": None if lemo is None else asdict(lemo.config),
            **({"lean": False} if lean is None else lean.settings),
        }
        if any(methods.values()):
            write_model_card(folder, self.model, methods)

    def _velora_adamw(self, moments: str) -> tuple[type, dict]:
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        return velora_adamw(kind, options, self.args.optim.value, moments)

    def _callback(self, kind: type):
        return next((c for c in self.callback_handler.callbacks if isinstance(c, kind)), None)

    def _logged(self) -> list[LoggedMetrics]:
        return [c for c in self.callback_handler.callbacks if isinstance(c, LoggedMetrics)]


class TokenSeekTrainer(TokenSeekMixin, Trainer):
    """
    Drop-in for [`~transformers.Trainer`]: the same model, trained with a fraction of the activation memory.

    Takes what `Trainer` takes. With plain `TrainingArguments` TokenSeek is on with its defaults; with
    [`TokenSeekArguments`] the fields `seek`, `velora`, `ist`, `lemo` and `lean` decide. Logs `seek/...`, `velora/...`,
    `ist/...`, `lemo/...`, `memory/...` and `speed/...`.

    ```python
    trainer = TokenSeekTrainer(model, args=TokenSeekArguments(output_dir="out", seek={"context": 0.2}), ...)
    trainer.train()
    ```

    Raises:
        ValueError: the model, an argument or `compute_loss_func` is not supported, by name and with the next step.
    """
