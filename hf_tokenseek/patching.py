"""What was swapped where, and how to take it back: [`attach`] and its handle."""

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from torch import Tensor, nn

from .families import check_family
from .method_config import MethodConfig

if TYPE_CHECKING:
    from .ist.attach import IstHandle
    from .lean import LeanHandle
    from .lemo.attach import LemoHandle
    from .seek.attach import SeekHandle
    from .velora.attach import VeloraHandle


def find_causal_lm(model: nn.Module) -> nn.Module:
    """
    The `...ForCausalLM` inside parallel wrappers and PEFT models.

    Raises:
        ValueError: the model's family is refused or unknown.
    """
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    check_family(model)
    return model


def check_one_device(model: nn.Module) -> None:
    """
    Refuses a model whose layers lie on several devices: rows that are chosen on one are taken on all.

    Raises:
        ValueError: says which, and the next step.
    """
    places = list(dict.fromkeys(getattr(model, "hf_device_map", {}).values()))
    if len(places) > 1:
        raise ValueError(
            f"{type(model).__name__} is spread over {places} (device_map), and rows are chosen on one device. Load it "
            "with device_map={'': 0}, and share work among processes by DDP, FSDP2 or ZeRO-3."
        )


def find_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """
    The decoder layers of a causal language model, and their path.

    Raises:
        ValueError: there is no list of as many modules as the config has layers.
    """
    count = model.config.get_text_config().num_hidden_layers
    for path, module in model.base_model.named_modules(prefix=model.base_model_prefix):
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return path, module
    raise ValueError(f"{type(model).__name__} has no list of {count} decoder layers: not supported.")


@contextmanager
def evaluating(model: nn.Module):
    """
    Evaluation mode without dropout and router noise; gives every module its own mode back.

    The layers of bitsandbytes keep theirs: on some CPUs a 4-bit layer in evaluation mode repacks its weight for
    inference, for good, and has no backward any more.
    """
    training = [m for m in model.modules() if m.training and not type(m).__module__.startswith("bitsandbytes.")]
    # written past nn.Module's __setattr__, which takes longer for a thousand modules than a small model's forward
    for module in training:
        vars(module)["training"] = False
    try:
        yield
    finally:
        for module in training:
            vars(module)["training"] = True


@contextmanager
def recomputed_within(layer: nn.Module, context: Callable[[], AbstractContextManager]):
    """
    Enters `context`, now and whenever what is computed inside of the block is computed again.

    Some versions of transformers checkpoint inside of a layer's forward, and so do MLPs in tiles: what runs again in
    the backward pass runs after the block has been left.
    """
    name = "_gradient_checkpointing_func"
    checkpoints = {module: vars(module)[name] for module in layer.modules() if name in vars(module)}

    def within(checkpoint: Callable) -> Callable:
        def checkpoint_within(function: Callable, *args, **kwargs):
            def run(*args, **kwargs):
                with context():
                    return function(*args, **kwargs)

            return checkpoint(run, *args, **kwargs)

        return checkpoint_within

    for module, checkpoint in checkpoints.items():
        setattr(module, name, within(checkpoint))
    try:
        with context():
            yield
    finally:
        for module, checkpoint in checkpoints.items():
            setattr(module, name, checkpoint)


class Attachment:
    """
    Handle of what [`attach`] did; a context manager.

    Args:
        seek ([`SeekHandle`], *optional*): the attached TokenSeek.
        lean ([`LeanHandle`], *optional*): the lean layers.
        velora ([`VeloraHandle`], *optional*): the attached VeLoRA.
        ist ([`IstHandle`], *optional*): the attached sparse tuning.
        lemo ([`LemoHandle`], *optional*): the attached LeMo.
    """

    def __init__(
        self,
        seek: "SeekHandle | None" = None,
        lean: "LeanHandle | None" = None,
        velora: "VeloraHandle | None" = None,
        ist: "IstHandle | None" = None,
        lemo: "LemoHandle | None" = None,
    ):
        self.seek, self.lean, self.velora, self.ist, self.lemo = seek, lean, velora, ist, lemo

    @property
    def selection(self) -> Tensor | None:
        """
        `torch.LongTensor` of shape `(batch, k)`: rows of the last training forward, ascending, -1 padded.

        Raises:
            ValueError: TokenSeek is not attached.
        """
        if self.seek is None:
            raise ValueError("There is no selection: TokenSeek is not attached. Call attach(model, seek=True).")
        return self.seek.selection

    def report(self) -> str:
        """The table of what was swapped, and what the last micro-batch cost."""
        return "\n".join(handle.report() for handle in self._handles())

    def metrics(self, reset: bool = True) -> dict[str, float]:
        """
        The figures that a Trainer would log, of all methods, since the last call with `reset`.

        Args:
            reset (`bool`, *optional*, defaults to `True`): whether the next call starts from here.
        """
        found = {} if self.seek is None else self.seek.metrics.read(reset)
        for handle in (self.velora, self.lemo):
            found |= {} if handle is None else handle.telemetry.read(reset)
        return found | ({} if self.ist is None else self.ist.metrics(reset))

    def begin_step(self, step: int) -> None:
        """Tells every method which optimizer step the coming micro-batches belong to."""
        for handle in self._handles():
            # lean layers know no steps
            if handle is not self.lean:
                handle.begin_step(step)

    def undo(self) -> None:
        """Takes everything back."""
        for handle in reversed(self._handles()):
            handle.undo()

    def _handles(self) -> list:
        handles = self.seek, self.lean, self.velora, self.ist, self.lemo
        return [handle for handle in handles if handle is not None]

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, *error) -> None:
        self.undo()


def attach(
    model: nn.Module,
    *,
    seek: MethodConfig | dict | bool | None = None,
    velora: MethodConfig | dict | bool | None = None,
    ist: MethodConfig | dict | bool | None = None,
    lemo: MethodConfig | dict | bool | None = None,
    lean: bool = False,
    mlp_tiles: int = 1,
) -> Attachment:
    """
    Attaches methods to a model for plain training loops.

    ```python
    with attach(model, seek=SeekConfig(context=0.2), lean=True) as handle:
        loss = model(**batch).loss
        loss.backward()
        print(handle.report())
    ```

    Steps are not counted: `handle.begin_step(step)` before each optimizer step seeds what is random and is what
    `probe_steps` and schedules go by.

    Args:
        model (`transformers.PreTrainedModel` or `peft.PeftModel`):
            The model; its instance is patched, never its class.
        seek ([`SeekConfig`], `dict` or `bool`, *optional*):
            TokenSeek's configuration; `True` for the defaults.
        velora ([`VeloraConfig`], `dict` or `bool`, *optional*):
            VeLoRA's configuration; `True` for the defaults. With `compressed_state`, hand the model's trained
            parameters to [`~velora.VeloraAdamW`] afterwards.
        ist ([`IstConfig`], `dict` or `bool`, *optional*):
            Sparse tuning's configuration; `True` for the defaults. Build the optimizer afterwards, hand it over with
            `handle.ist.manage(optimizer)`, and call `handle.ist.begin_step(step)` before each of its steps.
        lemo ([`LemoConfig`], `dict` or `bool`, *optional*):
            LeMo's configuration; `True` for the defaults.
        lean (`bool`, *optional*, defaults to `False`):
            Swap norms, MLPs and LoRA layers for exact ones that save less.
        mlp_tiles (`int`, *optional*, defaults to 1):
            With `lean`: tiles of rows that each MLP is computed in, one after the other, and again in backward.

    Returns:
        [`Attachment`]: with `selection`, `report()`, `metrics()` and `undo()`.

    Raises:
        ValueError: nothing is to be attached, the model is not supported, or it is attached already.
    """
    from .ist import IstConfig
    from .ist.attach import IstHandle
    from .lean import LeanHandle, check_tiles
    from .lemo import LemoConfig
    from .lemo.attach import LemoHandle
    from .seek import SeekConfig
    from .seek.attach import SeekHandle
    from .velora import VeloraConfig
    from .velora.attach import VeloraHandle

    methods = {
        "seek": (SeekHandle, SeekConfig.parse(seek)),
        "lean": (LeanHandle, lean),
        "velora": (VeloraHandle, VeloraConfig.parse(velora)),
        "ist": (IstHandle, IstConfig.parse(ist)),
        "lemo": (LemoHandle, LemoConfig.parse(lemo)),
    }
    wanted = {name: (kind, config) for name, (kind, config) in methods.items() if config}
    check_tiles(mlp_tiles, bool(lean), bool(velora), getattr(methods["lemo"][1], "mlp", None) == "neurons")
    if not wanted:
        raise ValueError(
            "attach() got no method to attach. Pass seek=True, velora=True, ist=True, lemo=True or lean=True."
        )
    attached = Attachment()
    try:
        for name, (kind, config) in wanted.items():
            setattr(attached, name, kind(model, mlp_tiles if kind is LeanHandle else config))
    except BaseException:
        attached.undo()
        raise
    return attached
