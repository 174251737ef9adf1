"""Lean layers in any `Trainer`, as a callback."""

from torch import nn
from transformers import TrainerCallback

from ..lean import LeanHandle, check_tiles
from .ownership import Attaching


class LeanCallback(Attaching, TrainerCallback):
    """
    Trains with lean layers in any `Trainer`: exact norms, MLPs and LoRA layers that save less for backward.

    ```python
    trainer = Trainer(model, args, train_dataset=dataset, callbacks=[LeanCallback()])
    ```

    The layers are swapped when the trainer is built (before accelerate wraps the model) and given back when training
    ends; what was swapped is printed as a table. Works alone, with gradient checkpointing, and with TokenSeek.

    Args:
        mlp_tiles (`int`, *optional*, defaults to 1):
            Tiles of rows that each MLP is computed in, one after the other, and again in backward.

    Raises:
        ValueError: the model has no layer that can be made lean, `mlp_tiles` is no whole number of at least 1, or
            `use_liger_kernel` has replaced the layers already.
    """

    handle_type = LeanHandle

    def __init__(self, mlp_tiles: int = 1):
        self.mlp_tiles = check_tiles(mlp_tiles)

    @property
    def settings(self) -> dict[str, bool | int]:
        """The training arguments that say the same."""
        return {"lean": True, **({"mlp_tiles": self.mlp_tiles} if self.mlp_tiles > 1 else {})}

    def build(self, model: nn.Module) -> LeanHandle:
        """Lean layers in `model`."""
        return LeanHandle(model, self.mlp_tiles)

    def on_init_end(self, args, state, control, model=None, **kwargs) -> None:
        if args.use_liger_kernel:
            raise ValueError(
                "lean layers do not support `use_liger_kernel`=True: both replace the same layers. Set one of them to "
                "False."
            )
        self.attach(model)

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        self.attach(model)
        if state.is_local_process_zero:
            print(self.handle.swapped(), flush=True)
