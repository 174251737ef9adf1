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
    positions, keys are spread out to their own, and nobody sees those between them.

    Args:
        rows (`torch.LongTensor` of shape `(batch, k)`): kept positions, ascending, -1 behind them.
        segments (`torch.LongTensor` of shape `(batch, n)`): document numbers, -1 for padding.
        simple (`bool`): one document a sequence, so that causality is the whole rule.

    Attributes:
        taken (`dict`): positions and rotations of the kept rows, by what they are taken from: layers that keep the
            same rows share them.
    """

    def __init__(self, rows: Tensor, segments: Tensor, simple: bool):
        self.rows, self.n, self._segments, self._simple = rows, segments.shape[1], segments, simple
        self.taken: dict[int, tuple[Tensor, Tensor]] = {}
        self._documents: dict[bool, Tensor] = {}
        # one place more than there are positions takes what belongs nowhere
        self._at = rows.masked_fill(rows < 0, self.n)

    def spreads(self, window: int | None) -> bool:
        """Whether a window of this size hides anything."""
        return window is not None and window < self.n

    def segments(self, spread: bool) -> Tensor | None:
        """Documents of all positions, -1 where a token is dropped, `(batch, n)`; or of the kept rows, where needed."""
        if not spread and self._simple:
            return None
        if spread not in self._documents:
            if spread:
                found = self._segments.masked_fill(~self.to_positions(self.rows >= 0), -1)
            else:
                found = self._segments.gather(1, self.rows.clamp(min=0)).masked_fill(self.rows < 0, -1)
            self._documents[spread] = found
        return self._documents[spread]

    def forget(self) -> None:
        """Lets go of what layers share while they are computed; whoever still needs it has it."""
        self.taken.clear()
        self._documents.clear()

    def to_positions(self, values: Tensor) -> Tensor:
        """One value a kept row `(batch, k)` at its position `(batch, n)`, zeros elsewhere."""
        return values.new_zeros(len(values), self.n + 1).scatter_(1, self._at, values)[:, :-1]

    def spread(self, states: Tensor) -> Tensor:
        """Keys or values `(batch, heads, k, dim)` at their positions `(batch, heads, n, dim)`, zeros elsewhere."""
        full = states.new_zeros(*states.shape[:2], self.n + 1, states.shape[3])
        at = self._at[:, None, :, None].expand_as(states)
        return full.scatter_(2, at, states.detach())[:, :, :-1].contiguous()

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
        places, spreads = self.places, self.places.spreads(rule["window"])
        if spreads:
            states = places.spread(key), places.spread(value)
            return selected_attention(query, key, value, *states, places.rows, places.segments(True), **rule)
        return causal_attention(query, key, value, places.segments(False), **(rule | {"window": None}))


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
        scout, places, spreads = self.scout, self.places, self.places.spreads(rule["window"])
        segments = places.segments(spreads)
        states = (places.spread(key), places.spread(value)) if spreads else (compact(key), compact(value))
        own = rule if spreads else rule | {"window": None}
        scout.keep(module, *states)
        if scout.collects:
            slots = places.slots(scout.mass_rows)
            rows = scout.mass_rows.masked_fill(slots < 0, -1) if spreads else slots
            mass = received_mass(query, states[0], slots, rows, segments, **own)
            scout.add_mass(mass if spreads else places.to_positions(mass))
        if spreads:
            return selected_attention(query, key, value, *states, places.rows, segments, **own)
        return causal_attention(query, key, value, segments, **own)


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
        spreads = self.places.spreads(rule["window"])
        rows = self.ditch.rows if spreads else self.places.slots(self.ditch.rows)
        own = rule if spreads else rule | {"window": None}
        segments = self.places.segments(spreads)
        return selected_attention(query, key, value, *self.ditch.kept[module], rows, segments, **own)


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
