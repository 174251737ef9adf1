"""A decoder layer's two halves, by names of modules: each is what the layer computes while the other is mute."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from torch import Tensor, nn

from .patched_forward import replaced_forward
from .patching import recomputed_within

# names of the modules in front of the first and in front of the second residual sum
LAYOUTS = (
    (("input_layernorm", "self_attn"), ("post_attention_layernorm", "mlp")),
    (
        ("input_layernorm", "self_attn", "post_attention_layernorm"),
        ("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"),
    ),
    (("self_attn", "post_attention_layernorm"), ("mlp", "post_feedforward_layernorm")),
    (
        ("input_layernorm", "self_attn", "post_self_attn_layernorm"),
        ("post_attention_layernorm", "mlp", "post_mlp_layernorm"),
    ),
    (("ln_1", "attn"), ("ln_2", "mlp")),
)
_ATTENTION = ("self_attn", "attn")
# MLPs that answer with a pair, the scores of their router behind the hidden states
_PAIRS = ("GptOssMLP",)
# they change nothing where everything in front of them is zero
_NEUTRAL = (nn.Dropout, nn.Identity)


class Sublayers:
    """
    The halves of one decoder layer whose MLP follows its attention.

    Args:
        layer (`nn.Module`): the decoder layer.

    Raises:
        ValueError: its modules are not those of a known layout.
    """

    def __init__(self, layer: nn.Module):
        self.layer = layer
        own = {name for name, module in layer.named_children() if not isinstance(module, _NEUTRAL)}
        found = next((layout for layout in LAYOUTS if own == {*layout[0], *layout[1]}), None)
        if found is None:
            raise ValueError(
                f"mlp='dense' needs a layer whose MLP follows its attention, with modules as one of {LAYOUTS}, got "
                f"{type(layer).__name__} with {sorted(own)}. Use mlp='tokens'."
            )
        self._attention, self._mlp = found

    @property
    def mlp(self) -> nn.Module:
        """The layer's MLP."""
        return self.layer.mlp

    def attention_only(self):
        """The layer's forward inside the block, and what is computed again of it, adds nothing of the MLP."""
        return recomputed_within(self.layer, partial(muted, self.layer, self._mlp))

    def mlp_only(self):
        """Adds nothing of the attention."""
        return recomputed_within(self.layer, partial(muted, self.layer, self._attention))


@contextmanager
def muted(layer: nn.Module, names: tuple[str, ...]) -> Iterator[None]:
    """These modules of a layer answer with zeros, which take no memory, and compute nothing."""
    with ExitStack() as stack:
        for name in names:
            module = getattr(layer, name)
            in_pairs = name in _ATTENTION or any(kind.__name__ in _PAIRS for kind in type(module).__mro__)
            stack.enter_context(replaced_forward(module, _zeros(in_pairs)))
        yield


def _zeros(in_pairs: bool) -> Callable:
    def forward(*args, **kwargs):
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        zeros = hidden.new_zeros(1).expand_as(hidden)
        return (zeros, None) if in_pairs else zeros

    return forward
