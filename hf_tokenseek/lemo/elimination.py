"""Which tokens each layer keeps in one forward pass: the value of the keyword `lemo=`."""

import torch
from torch import Tensor

from .blocks import Blocks, Kept
from .config import LemoConfig
from .scores import Scorer
from .states import Places, Watch, WatchedState
from .telemetry import Telemetry


class Elimination:
    """
    The choice of every layer, made when it is first asked for and kept for everybody who computes the layer again.

    Args:
        blocks ([`Blocks`]): of the micro-batch.
        config ([`LemoConfig`]): how to choose.
        shares (`list[float]`): share of blocks that each layer keeps, 1 for a layer that runs on all tokens.
        scorer ([`Scorer`]): scores the blocks of a layer.
        simple (`bool`): one document a sequence without padding on the left, so that causality is the whole rule.
        telemetry ([`Telemetry`]): is told what is kept.
        probing (`bool`): compare each choice with the paper's scores.

    Attributes:
        kept (`dict[int, Kept]`): what layers have chosen, by their index.
        scores (`torch.Tensor` of shape `(batch, blocks)`, *optional*): those that the last layer has chosen by.
        watch ([`Watch`]): of attention in the layer below the first one that drops tokens.
    """

    def __init__(
        self,
        blocks: Blocks,
        config: LemoConfig,
        shares: list[float],
        scorer: Scorer,
        simple: bool,
        telemetry: Telemetry,
        probing: bool,
    ):
        self.blocks, self.config, self.shares, self.scorer, self.simple = blocks, config, shares, scorer, simple
        self._telemetry, self._probing = telemetry, probing
        self.kept: dict[int, Kept] = {}
        self.scores: Tensor | None = None
        self.watch = Watch(blocks, self.visibility)
        first = next((layer for layer in range(len(shares)) if self.drops(layer)), 0)
        self._watched = first - 1 if config.score == "previous_layer" else None
        self._places: dict[int, Places] = {}
        # by what is chosen with: layers that choose alike share what they keep
        self._alike: dict[tuple, tuple[Kept, Places]] = {}

    @property
    def visibility(self) -> Tensor | None:
        """Document numbers of all tokens where they restrict attention, else `None`."""
        return None if self.simple else self.blocks.segments

    def drops(self, layer: int) -> bool:
        """Whether a layer leaves tokens out."""
        return self.shares[layer] < 1

    def watching(self, layer: int, state):
        """
        What attention is to do in a layer that runs on all tokens: what it does anyway, watched where it scores.

        Args:
            layer (`int`): its index.
            state (*optional*): the state that TokenSeek has for it.
        """
        return WatchedState(state, self.watch) if layer == self._watched else state

    def places(self, layer: int, call) -> Places:
        """
        The rows that a layer keeps.

        Args:
            layer (`int`): its index.
            call ([`LayerCall`]): its call, by which it is scored the first time.
        """
        if layer not in self._places:
            with torch.no_grad():
                kept, self._places[layer] = self._choose(layer, call)
                self.kept[layer] = kept
                self._telemetry.kept(layer, kept, self.blocks)
                if self._probing:
                    self._telemetry.probe(kept, self.blocks, self.scorer.oracle(layer, call, self.blocks))
        return self._places[layer]

    def forget(self) -> None:
        """Lets go of what layers share while they are computed; whoever still needs it has it."""
        for places in set(self._places.values()):
            places.forget()

    def computed(self) -> Tensor:
        """`torch.BoolTensor` of shape `(batch, n)`: real tokens that no layer has left out so far."""
        everywhere = self.blocks.segments >= 0
        for places in set(self._places.values()):
            everywhere = everywhere & places.to_positions(places.rows >= 0)
        return everywhere

    def _choose(self, layer: int, call) -> tuple[Kept, Places]:
        config = self.config
        if self.scores is None or (config.rescore and len(self.kept) % config.rescore == 0):
            self.scores = self.scorer(layer, call, self)
            self._alike.clear()
        rule = (self.shares[layer],)
        if config.thresholds is not None:
            rule = *rule, config.bounds[0], config.thresholds[layer]
        if rule not in self._alike:
            kept = self.blocks.choose(self.scores, *rule)
            self._alike[rule] = kept, Places(kept.rows, self.blocks.segments, self.simple)
        return self._alike[rule]
