"""
The attention seam: one function registered with transformers, its state passed as the keyword `seek=`.

`model(..., seek=state)` travels through every decoder layer (also through gradient checkpointing's recompute) down to
the attention function. Without the keyword the function is the implementation the model had before.
"""

import sys
import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from tokenseek_kernels import attention_mass, causal_attention, selected_attention

from ..families import WINDOW_FROM_CONFIG

# in the names of all versions of FlashAttention, which transformers tells by it
_FLASH = "flash"
# the implementation below each registered one
_ORIGINALS: dict[str, str] = {}
# who needs the registered attention of which model
_users: weakref.WeakKeyDictionary[torch.nn.Module, weakref.WeakSet] = weakref.WeakKeyDictionary()


class ScoutState:
    """
    State of the scouting pass: keeps every attention module's keys and values, adds up attention mass.

    Args:
        segments (`torch.LongTensor` of shape `(batch, n)`, *optional*): document numbers where they matter.
        mass_rows (`torch.LongTensor` of shape `(batch, m)`, *optional*): the queries whose attention counts, -1 for
            empty slots; `None` collects nothing.
        layers (`Collection[int]`, *optional*): whose attention counts, by the order of the calls; all if not given.
    """

    def __init__(
        self, segments: Tensor | None, mass_rows: Tensor | None = None, layers: Collection[int] | None = None
    ):
        self.segments, self.mass_rows, self.layers = segments, mass_rows, layers
        self.kept: dict[torch.nn.Module, tuple[Tensor, Tensor]] = {}
        self.mass: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values kept."""
        return sum(tensor.nbytes for pair in self.kept.values() for tensor in pair)

    def keep(self, module: torch.nn.Module, key: Tensor, value: Tensor) -> None:
        """
        Keeps what an attention module's queries see.

        Raises:
            ValueError: the module has run before.
        """
        if module in self.kept:
            raise ValueError(
                f"{type(module).__name__} ran twice in one forward pass: a layer that is shared between depths cannot "
                "keep its keys and values. TokenSeek does not support this model."
            )
        self.kept[module] = key, value

    @property
    def collects(self) -> bool:
        """Whether the attention of the layer that was kept last counts."""
        return self.mass_rows is not None and (self.layers is None or len(self.kept) - 1 in self.layers)

    def add_mass(self, mass: Tensor) -> None:
        """Adds the attention that each position received in one layer, `(batch, n)`."""
        self.mass = mass if self.mass is None else self.mass.add_(mass)

    def attend(self, module, query, key, value, **rule) -> Tensor:
        """Plain attention of all rows; `(batch, n, heads, value_dim)`."""
        key_kept, value_kept = compact(key), compact(value)
        self.keep(module, key_kept, value_kept)
        if self.collects:
            self.add_mass(received_mass(query, key_kept, self.mass_rows, self.mass_rows, self.segments, **rule))
        # with gradient where the paper's partial backward runs through the last block
        return causal_attention(query, key, value, self.segments, **rule)


class DitchState:
    """
    State of the pass with gradients: only selected rows, attending to everything that was scouted.

    Args:
        kept (`dict`): keys and values by attention module, from [`ScoutState`].
        rows (`torch.LongTensor` of shape `(batch, k)`): selected positions, ascending, -1 behind them.
        segments (`torch.LongTensor` of shape `(batch, n)`, *optional*): document numbers where they matter.
    """

    def __init__(self, kept: dict[torch.nn.Module, tuple[Tensor, Tensor]], rows: Tensor, segments: Tensor | None):
        self.kept, self.rows, self.segments = kept, rows, segments

    def attend(self, module, query, key, value, **rule) -> Tensor:
        """Attention of the selected rows; `(batch, k, heads, value_dim)`."""
        return selected_attention(query, key, value, *self.kept[module], self.rows, self.segments, **rule)


def received_mass(query: Tensor, key: Tensor, slots: Tensor, rows: Tensor, segments: Tensor | None, **rule) -> Tensor:
    """
    The attention that each key receives from some of the queries, `(batch, keys)`, without gradient.

    Args:
        query (`torch.Tensor` of shape `(batch, heads, n, dim)`): all queries.
        key (`torch.Tensor` of shape `(batch, kv_heads, keys, dim)`): all keys.
        slots (`torch.LongTensor` of shape `(batch, m)`): which queries count, -1 for none.
        rows (`torch.LongTensor` of shape `(batch, m)`): where these stand among the keys, -1 for those that count not.
        segments, rule: as in [`attention_mass`].
    """
    index = slots.clamp(min=0)[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[-1])
    rule["sinks"] = None if rule["sinks"] is None else rule["sinks"].detach()
    return attention_mass(query.detach().gather(2, index), key.detach(), rows, segments, **rule)


def compact(states: Tensor) -> Tensor:
    """Without gradient, in a storage of its own size: a slice of a fused projection would keep all of it alive."""
    states = states.detach()
    own_size = states.untyped_storage().nbytes() == states.numel() * states.element_size()
    return states if own_size else states.clone(memory_format=torch.contiguous_format)


def _attention(original: str):
    def tokenseek_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, seek=None, **kwargs):
        if seek is None:
            plain = _original_attention(module, original)
            # FlashAttention reads in the configuration which of its versions it is
            with _named(module.config, original) if _FLASH in original else nullcontext():
                return plain(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
        if not getattr(module, "is_causal", True):
            raise ValueError(f"{type(module).__name__} is not causal. TokenSeek selects rows of causal attention.")
        if kwargs.get("position_bias") is not None:
            raise ValueError(
                f"{type(module).__name__} adds a position bias to attention, which TokenSeek cannot select."
            )
        query, key, value = _autocast(query, key, value)
        rule = {
            "scale": scaling,
            "softcap": kwargs.get("softcap"),
            "window": _window(module, kwargs),
            "sinks": kwargs.get("s_aux"),
        }
        return seek.attend(module, query, key, value, **rule), None

    return tokenseek_attention


def _window(module, kwargs: dict) -> int | None:
    if "sliding_window" in kwargs:
        return kwargs["sliding_window"]
    # some families put the window into the mask only; the layer, or the config, knows it
    config = module.config if getattr(module.config, "model_type", None) in WINDOW_FROM_CONFIG else None
    return getattr(module, "sliding_window", None) or getattr(config, "sliding_window", None)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What fused attention does under autocast: everything in the autocast dtype (RoPE may have left float32)."""
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        return tuple(t.to(dtype) if t.dtype == torch.float32 else t for t in tensors)
    return tensors


@contextmanager
def _named(config, implementation: str) -> Iterator[None]:
    """Inside the block a configuration has this attention implementation."""
    before = config._attn_implementation_internal
    config._attn_implementation_internal = implementation
    try:
        yield
    finally:
        config._attn_implementation_internal = before


def _original_attention(module, original: str):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(original, eager)


def use_attention(model: torch.nn.Module, user: object) -> str:
    """
    Puts the registered attention into a model, on top of what it has, unless it is there.

    Args:
        model (`transformers.PreTrainedModel`): the model.
        user (`object`): whoever needs it, until [`leave_attention`].

    Returns:
        `str`: its name.
    """
    name = register_attention(original_attention(model))
    model.set_attn_implementation(name)
    _users.setdefault(model, weakref.WeakSet()).add(user)
    return name


def leave_attention(model: torch.nn.Module, user: object) -> None:
    """Gives a model its own attention back when nobody else needs the registered one."""
    users = _users.get(model, set())
    users.discard(user)
    if not users:
        model.set_attn_implementation(original_attention(model))


def original_attention(model: torch.nn.Module) -> str:
    """The attention implementation that a model has below the registered one."""
    name = model.config._attn_implementation
    return _ORIGINALS.get(name, name)


def register_attention(original: str) -> str:
    """
    Registers TokenSeek's attention on top of the implementation `original` (its attention and its mask).

    Returns:
        `str`: the name to give to `model.set_attn_implementation`.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    # a slash would be read as a repository of kernels, and whatever is called flash as a package to be imported
    name = f"tokenseek_{original.replace('/', '--').replace(_FLASH, 'fl')}"
    _ORIGINALS[name] = original
    AttentionInterface.register(name, _attention(original))
    if original in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[original])
    return name
