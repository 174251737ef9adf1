"""VeLoRA in any `Trainer`, as a callback."""

from ..velora import VeloraAdamW, VeloraConfig
from ..velora.attach import VeloraHandle
from ..velora.refusals import refuse_arguments
from .stateful import StatefulCallback


class VeloraCallback(StatefulCallback):
    """
    Trains with VeLoRA in any `Trainer`: linear layers keep a few numbers a token of their input.

    ```python
    trainer = Trainer(model, args, train_dataset=dataset, callbacks=[VeloraCallback(VeloraConfig(groups=32))])
    ```

    The layers are swapped when the trainer is built and given back when training ends. Each checkpoint gets a file
    `velora.pt` with the directions, from which a resumed run goes on exactly. Logs `velora/saved_mib`, and on probe
    steps `velora/retained_energy` and `velora/gradient_cosine`.

    Args:
        config ([`VeloraConfig`], `dict` or `bool`, *optional*): what to compress; defaults to `VeloraConfig()`.

    Raises:
        ValueError: the model, its layers or a training argument is not supported, by name.
    """

    config_type, handle_type, state_file, method = VeloraConfig, VeloraHandle, "velora.pt", "VeLoRA"

    def on_init_end(self, args, state, control, model=None, **kwargs) -> None:
        refuse_arguments(args, self.config)
        self.attach(model)

    def attach(self, model) -> None:
        """Attaches the method to `model`, unless it is; trl replaces the model's forward between the two."""
        super().attach(model)
        self.handle.resume()

    def accept(self, optimizer) -> None:
        """With a compressed state it has to be the one that knows it; raises as [`check_optimizer`] does."""
        if self.config.compressed_state:
            check_optimizer(optimizer, self.handle)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        # callbacks that come later have gone around trl's forward only now, and so around ours
        self.handle.resume()
        self.handle.begin_step(state.global_step)

    def metrics(self, reset: bool = True) -> dict[str, float]:
        """
        The figures of [`Telemetry`] since the last call with `reset`.

        Args:
            reset (`bool`, *optional*, defaults to `True`): whether the next call starts from here.
        """
        return {} if self.handle is None else self.handle.telemetry.read(reset)


def check_optimizer(optimizer, handle: VeloraHandle) -> None:
    """
    Refuses an optimizer that would treat compressed gradients as if they were weights, or does not know them.

    Raises:
        ValueError: says which one to use.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(inner, VeloraAdamW):
        raise ValueError(
            f"compressed_state=True needs VeloraAdamW, got {type(inner).__name__}. Use TokenSeekTrainer, which builds "
            "it, or pass optimizer_cls_and_kwargs=(hf_tokenseek.velora.VeloraAdamW, {'lr': ...}) to the trainer."
        )
    known = {id(parameter) for group in inner.param_groups for parameter in group["params"]}
    for key, compressed in handle.inputs.items():
        if any(id(module.velora_gradient) not in known for module in compressed.unit.compressible):
            raise ValueError(
                f"The optimizer does not have the compressed gradients of {key} and would not train its layers: it "
                "was built before they were swapped. Let the trainer build it; to train again, build a new trainer."
            )
