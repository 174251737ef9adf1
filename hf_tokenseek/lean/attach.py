"""Lean layers on one model instance: swap, show, take back."""

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ..parameters import shape_of
from . import adapters, mlps, norms
from .tiles import CHECKPOINT, tiled
from .trial import Trial

NO_FORM = "no lean form computes the same"


@dataclass(frozen=True)
class Swap:
    """
    How one module is made lean.

    Args:
        kind (`str`): `"norm"`, `"MLP"` or `"LoRA"`.
        forward (`Callable`): the lean forward.
        before, after (`str`): bytes saved a token, as formulas in H (the module's width) and I (an MLP's inner width).
    """

    kind: str
    forward: Callable
    before: str
    after: str


class LeanHandle:
    """
    Swaps the norms, MLPs and LoRA layers of a model instance for lean ones that compute the same.

    A module changes its class to a subclass with another `forward`, so that parameters, hooks, names, `isinstance` and
    gradient checkpointing stay as they are. A class is swapped only if a trial with a small copy of the module gives
    the same output and the same gradients; others stay plain and are listed. Works alone and with TokenSeek.

    Args:
        model (`nn.Module`): any model, also inside PEFT or a parallel wrapper.
        mlp_tiles (`int`, *optional*, defaults to 1): tiles of rows that each MLP is computed in, see [`tiled`].

    Attributes:
        attached_to (`nn.Module`): the model as it was given.
        swaps (`dict[nn.Module, Swap]`): what was swapped.
        left_alone (`Counter`): class names of norms and MLPs that stay plain because no lean form computes the same.

    Raises:
        ValueError: there is nothing to swap or nothing to tile, or the model is lean already.
    """

    def __init__(self, model: nn.Module, mlp_tiles: int = 1):
        self.attached_to, self.mlp_tiles = model, check_tiles(mlp_tiles)
        self.swaps: dict[nn.Module, Swap] = {}
        self.left_alone: Counter[str] = Counter()
        if any(hasattr(type(module), "_plain_class") for module in model.modules()):
            raise ValueError("The model's layers are lean already. Call undo() on the first handle.")
        dtype = _dtype_of(model)
        known: dict[tuple, Swap | str | None] = {}
        for module in model.modules():
            key = _likeness(module)
            if key not in known:
                known[key] = _find_swap(module, dtype, mlp_tiles)
            if isinstance(known[key], Swap):
                self.swaps[module] = known[key]
            elif known[key] == NO_FORM:
                self.left_alone[type(module).__name__] += 1
        if not self.swaps:
            raise ValueError(
                f"lean=True finds nothing to swap in {type(model).__name__}: it has no norm written in Python, no MLP "
                f"of a known form and no LoRA layer (left alone: {dict(self.left_alone)}). Leave lean off."
            )
        if mlp_tiles > 1 and not any(swap.kind == "MLP" for swap in self.swaps.values()):
            raise ValueError(
                f"mlp_tiles={mlp_tiles} finds no MLP of a known form in {type(model).__name__}. Leave it at 1."
            )
        for module, swap in self.swaps.items():
            module.__class__ = _lean_class(type(module), swap.forward)
            if self._is_tiled(module):
                vars(module).update(CHECKPOINT)

    def undo(self) -> None:
        """Gives every module its own class back."""
        for module in self.swaps:
            if self._is_tiled(module):
                for name in CHECKPOINT:
                    vars(module).pop(name, None)
            if (plain := getattr(type(module), "_plain_class", None)) is not None:
                module.__class__ = plain

    def swapped(self) -> str:
        """A table of what was swapped, with the bytes a token saved before and after."""
        rows = Counter(
            (swap.kind, type(module).__name__.removeprefix("Lean"), swap.before, swap.after)
            for module, swap in self.swaps.items()
        )
        lines = [
            f"Lean layers in {type(self.attached_to).__name__}: exact; bytes saved a token, H wide, I inside an MLP"
        ]
        for (kind, name, before, after), count in rows.items():
            lines.append(f"  {kind:5} {name:24} {count:4} x   {before:>18} -> {after}")
        if self.left_alone:
            named = ", ".join(f"{count} x {name}" for name, count in self.left_alone.items())
            lines.append(f"  left alone, as {NO_FORM}: {named}")
        return "\n".join(lines)

    def _is_tiled(self, module: nn.Module) -> bool:
        return self.mlp_tiles > 1 and self.swaps[module].kind == "MLP"

    # one name for what every handle prints
    report = swapped


def check_tiles(mlp_tiles: int, lean: bool = True, velora: bool = False, neurons: bool = False) -> int:
    """
    The same number, if it is one and the methods beside it know tiles.

    Raises:
        ValueError: it is no whole number of at least 1, or more than 1 without lean layers, with VeLoRA or with LeMo's
            `mlp="neurons"`.
    """
    if isinstance(mlp_tiles, bool) or not isinstance(mlp_tiles, int) or mlp_tiles < 1:
        raise ValueError(f"`mlp_tiles` should be a whole number of at least 1, got {mlp_tiles!r}.")
    if mlp_tiles > 1 and not lean:
        raise ValueError(f"mlp_tiles={mlp_tiles} tiles lean MLPs. Set lean=True with it, or leave it at 1.")
    if mlp_tiles > 1 and velora:
        raise ValueError(f"VeLoRA knows no tiles, got mlp_tiles={mlp_tiles}: each keeps its input. Leave it at 1.")
    if mlp_tiles > 1 and neurons:
        raise ValueError(
            f"LeMo's mlp='neurons' has an MLP of its own that knows no tiles, got mlp_tiles={mlp_tiles}. Leave it at "
            "1, or use mlp='tokens'."
        )
    return mlp_tiles


def _likeness(module: nn.Module) -> tuple:
    """Modules of one likeness compute the same function of their input and parameters."""
    plain = (bool, int, float, str, tuple)
    settings = tuple(sorted((name, repr(value)) for name, value in vars(module).items() if isinstance(value, plain)))
    shapes = tuple((name, shape_of(p), p.dtype, p.requires_grad) for name, p in module.named_parameters())
    return type(module), settings, shapes


def _find_swap(module: nn.Module, dtype: torch.dtype, mlp_tiles: int) -> Swap | str | None:
    """How to make `module` lean; NO_FORM if nothing computes the same, `None` if there is nothing to gain."""
    if adapters.is_lora(module):
        return Swap("LoRA", adapters.lean_forward(type(module).forward), "H, cast and dropped", "H")
    if norms.is_candidate(module):
        kind, found, formulas = "norm", norms.lean_forward(module, dtype), _norm_formulas
    elif (form := mlps.form_of(module)) is not None:
        kind, found, formulas = "MLP", mlps.lean_forward(module, form, dtype), _mlp_formulas
    else:
        return None
    if found is None:
        return NO_FORM
    forward, trial = found
    before, after = formulas(module, trial)
    if kind == "MLP" and mlp_tiles > 1:
        return Swap(kind, tiled(forward, mlp_tiles), before, f"{dtype.itemsize} H, in {mlp_tiles} tiles")
    return Swap(kind, forward, before, after) if trial.after < trial.before else None


def _dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype that trials are run in: bfloat16 stands for every 16-bit one."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return torch.bfloat16 if dtype.itemsize == 2 else torch.float32


def _norm_formulas(module: nn.Module, trial: Trial) -> tuple[str, str]:
    width = norms.width_of(module)
    return tuple(f"{bytes_ // width} H + {bytes_ % width}" for bytes_ in (trial.before, trial.after))


def _mlp_formulas(module: nn.Module, trial: Trial) -> tuple[str, str]:
    hidden, inner = mlps.TRIAL_WIDTHS
    return tuple(f"{bytes_ % inner // hidden} H + {bytes_ // inner} I" for bytes_ in (trial.before, trial.after))


@functools.cache
def _lean_class(plain: type, forward: Callable) -> type:
    return type(f"Lean{plain.__name__}", (plain,), {"forward": forward, "_plain_class": plain})
