"""trl's `SFTTrainer` with TokenSeek inside."""

from dataclasses import dataclass

from .arguments import MethodArguments, TokenSeekArguments
from .model_card import TAG
from .trainer import TokenSeekMixin

try:
    from trl import SFTConfig, SFTTrainer
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"TokenSeekSFTTrainer needs the package `trl` ({error}). Run `pip install 'hf_tokenseek[trl]'`, or use "
        "TokenSeekTrainer, which needs transformers only.",
        name=error.name,
    ) from error


@dataclass
class TokenSeekSFTConfig(MethodArguments, SFTConfig):
    """
    [`~trl.SFTConfig`] with the fields of [`MethodArguments`].

    > Parameters that control token selection

    Args:
        seek ([`SeekConfig`], `dict` or `str`, *optional*, defaults to `"true"`):
            TokenSeek's configuration; `None` and `false` turn it off.
        velora ([`VeloraConfig`], `dict` or `str`, *optional*, defaults to `"false"`):
            VeLoRA's configuration, likewise; off by default.
        ist ([`IstConfig`], `dict` or `str`, *optional*, defaults to `"false"`):
            Sparse tuning's configuration, likewise; off by default.
        lemo ([`LemoConfig`], `dict` or `str`, *optional*, defaults to `"false"`):
            LeMo's configuration, likewise; off by default.
        lean (`bool`, *optional*, defaults to `False`):
            Swap norms, MLPs and LoRA layers for exact ones that save less for backward.
        mlp_tiles (`int`, *optional*, defaults to 1):
            With `lean`: tiles of rows that each MLP is computed in, one after the other, and again in backward; for
            sequences of many thousands of tokens.

    Raises:
        ValueError: a field of a configuration is unknown or outside its allowed set.
    """


class TokenSeekSFTTrainer(TokenSeekMixin, SFTTrainer):
    """
    Drop-in for [`~trl.SFTTrainer`]: the same fine-tuning with a fraction of the activation memory.

    Takes what `SFTTrainer` takes. With plain [`~trl.SFTConfig`] TokenSeek is on with its defaults; with
    [`TokenSeekSFTConfig`] the fields `seek`, `velora`, `ist`, `lemo` and `lean` decide. trl's own metrics (`entropy`,
    `mean_token_accuracy`) are those of the tokens that were trained; `seek/...`, `memory/...` and `speed/...` are
    logged beside them.

    ```python
    trainer = TokenSeekSFTTrainer(model, args=TokenSeekSFTConfig(output_dir="out", seek={"context": 0.2}), ...)
    trainer.train()
    ```

    Raises:
        ValueError: the model, its adapter, an argument or `compute_loss_func` is not supported, by name and with the
            next step.
    """

    _tag_names = [*SFTTrainer._tag_names, TAG]

    def __init__(self, model, args=None, *positional, **kwargs):
        if isinstance(args, TokenSeekArguments):
            raise ValueError(
                "TokenSeekSFTTrainer got TokenSeekArguments, which trl cannot read. Pass the same fields to "
                "TokenSeekSFTConfig."
            )
        super().__init__(model, args, *positional, **kwargs)
