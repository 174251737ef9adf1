"""
What attention does in a layer that runs on kept rows.

Each state is handed down as the keyword `seek=`, in place of the state that the pass over the model has, and is asked
by the function that `register_attention` has registered.
"""

import torch
from torch import Tensor

from tokenseek_kernels import causal_attention, selected_attention

from ..seek.attention import DitchState, ScoutState, compact, received_mass
from .blocks import Blocks


class Places:
    """
    The kept rows of a layer as queries and keys.

    They stand side by side and see each other in their order: dropped tokens cost nothing. Where a window counts
    tokens, each query is told which of the kept keys it begins with.

    Args:
        rows (`torch.LongTensor` of shape `(batch, k)`): kept positions, ascending, -1 behind them.
        segments (`torch.LongTensor` of shape `(batch, n)`): document numbers, -1 for padding.
        simple (`bool`): one document a sequence, so that causality is the whole rule.

    Attributes:
        segments (`torch.LongTensor` of shape `(batch, k)`, *optional*): documents of the kept rows, where needed.
        taken (`dict`): positions and rotations of the kept rows, by what they are taken from: layers that keep the
            same rows share them.
    """

    def __init__(self, rows: Tensor, segments: Tensor, simple: bool):
        self.rows, self.n = rows, segments.shape[1]
        self.segments: Tensor | None = None
        if not simple:
            self.segments = segments.gather(1, rows.clamp(min=0)).masked_fill(rows < 0, -1)
        self.taken: dict[int, tuple[Tensor, Tensor]] = {}
        self._first_keys: dict[int, Tensor] = {}
        # one place more than there are positions takes what belongs nowhere
        self._at = rows.masked_fill(rows < 0, self.n)

    def rule(self, rule: dict) -> dict:
        """The rule of attention over all tokens as that of the kept ones."""
        window = rule["window"]
        if window is None or window >= self.n:
            return rule | {"window": None}
        if window not in self._first_keys:
            # layers of one window share them
            self._first_keys[window] = torch.searchsorted(self._at, self._at - window + 1)
        return rule | {"first_keys": self._first_keys[window]}

    def forget(self) -> None:
        """Lets go of what layers share while they are computed; whoever still needs it has it."""
        self.taken.clear()
        self._first_keys.clear()

    def to_positions(self, values: Tensor) -> Tensor:
        """One value a kept row `(batch, k)` at its position `(batch, n)`, zeros elsewhere."""
        return values.new_zeros(len(values), self.n + 1).scatter_(1, self._at, values)[:, :-1]

    def slots(self, rows: Tensor) -> Tensor:
        """The place of each of these positions among the kept rows, -1 for those that are not kept."""
        found = torch.searchsorted(self._at, rows.contiguous()).clamp(max=self.rows.shape[1] - 1)
        return found.masked_fill((self._at.gather(1, found) != rows) | (rows < 0), -1)


class KeptState:
    """
    Attention of the kept rows among themselves.

    Args:
        places ([`Places`]): the kept rows.
    """

    def __init__(self, places: Places):
        self.places = places

    def attend(self, module, query: Tensor, key: Tensor, value: Tensor, **rule) -> Tensor:
        """`(batch, k, heads, value_dim)`; what stands in empty slots does not matter."""
        return causal_attention(query, key, value, self.places.segments, **self.places.rule(rule))


class KeptScoutState:
    """
    The same in a scouting pass: keeps keys and values for the pass that follows, adds up attention mass.

    Args:
        scout ([`ScoutState`]): of the whole pass.
        places ([`Places`]): the kept rows.
    """

    def __init__(self, scout: ScoutState, places: Places):
        self.scout, self.places = scout, places

    def attend(self, module, query: Tensor, key: Tensor, value: Tensor, **rule) -> Tensor:
        """`(batch, k, heads, value_dim)`; what stands in empty slots does not matter."""
        scout, places = self.scout, self.places
        rule = places.rule(rule)
        kept = compact(key), compact(value)
        scout.keep(module, *kept)
        if scout.collects:
            slots = places.slots(scout.mass_rows)
            mass = received_mass(query, kept[0], slots, slots, places.segments, **rule)
            scout.add_mass(places.to_positions(mass))
        return causal_attention(query, key, value, places.segments, **rule)


class KeptDitchState:
    """
    The same in TokenSeek's pass with gradients: selected rows, all of them kept, attend to all kept rows.

    Args:
        ditch ([`DitchState`]): of the whole pass.
        places ([`Places`]): the kept rows.
    """

    def __init__(self, ditch: DitchState, places: Places):
        self.ditch, self.places = ditch, places

    def attend(self, module, query: Tensor, key: Tensor, value: Tensor, **rule) -> Tensor:
        """`(batch, k, heads, value_dim)`; zeros in empty slots."""
        places, kept = self.places, self.ditch.kept[module]
        rows = places.slots(self.ditch.rows)
        return selected_attention(query, key, value, *kept, rows, places.segments, **places.rule(rule))


class Watch:
    """
    How much attention the blocks get in a layer that runs on all tokens.

    Args:
        blocks ([`Blocks`]): of the micro-batch; queries of those that ask count.
        visibility (`torch.Tensor`, *optional*): document numbers where they restrict attention.

    Attributes:
        scores (`torch.FloatTensor` of shape `(batch, blocks)`, *optional*): what has been seen.
    """

    def __init__(self, blocks: Blocks, visibility: Tensor | None):
        self.blocks, self.visibility = blocks, visibility
        self.scores: Tensor | None = None

    @torch.no_grad()
    def see(self, query: Tensor, key: Tensor, **rule) -> None:
        """Adds up the attention of the layer's first call; who computes it again does not change what was chosen."""
        if self.scores is None:
            asking = self.blocks.asking(self.blocks.config.queries)[:, :, None]
            rows = self.blocks.tokens.masked_fill(~asking, -1).flatten(1)
            mass = received_mass(query, key, rows, rows, self.visibility, **rule)
            self.scores = self.blocks.at_tokens(mass, 0.0).sum(2)


class WatchedState:
    """
    Attention as it is, watched.

    Args:
        inner (*optional*): the state that the layer has anyway; plain attention otherwise.
        watch ([`Watch`]): sees it.
    """

    def __init__(self, inner, watch: Watch):
        self.inner, self.watch = inner, watch

    def attend(self, module, query: Tensor, key: Tensor, value: Tensor, **rule) -> Tensor:
        """`(batch, n, heads, value_dim)`."""
        self.watch.see(query, key, **rule)
        if self.inner is not None:
            return self.inner.attend(module, query, key, value, **rule)
        return causal_attention(query, key, value, self.watch.visibility, **rule)


class PeekState:
    """Only takes down what a layer asks and answers: its queries and keys, with their rotation."""

    def __init__(self):
        self.query: Tensor | None = None
        self.key: Tensor | None = None

    def attend(self, module, query: Tensor, key: Tensor, value: Tensor, **rule) -> Tensor:
        """Zeros `(batch, rows, heads, value_dim)`: nobody reads what the layer goes on to compute."""
        self.query, self.key = query, key
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
