"""One decoder layer on the rows it keeps."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokenseek_kernels import join_rows

from ..patched_forward import PatchedForward
from ..patching import evaluating, recomputed_within
from ..seek.attention import DitchState, ScoutState
from ..seek.passes import hold
from ..sublayers import Sublayers
from .config import LemoConfig
from .elimination import Elimination
from .first_norm import split_for
from .neurons import NeuronMlp
from .offload import Offload
from .states import KeptDitchState, KeptScoutState, KeptState, PeekState, Places


class LayerCall:
    """
    One call of a decoder layer, to be made again with other rows.

    Args:
        layer (`nn.Module`): the layer.
        original (`Callable`): its own forward.
        args, kwargs: what it was called with; the hidden states `(batch, n, width)` come first.

    Attributes:
        hidden (`torch.Tensor` of shape `(batch, n, width)`): the layer's input.
        seek (*optional*): the state of TokenSeek's pass.
    """

    def __init__(self, layer: nn.Module, original: Callable, args: tuple, kwargs: dict):
        self.layer, self.original, self._kwargs = layer, original, dict(kwargs)
        self.seek = self._kwargs.pop("seek", None)
        self.hidden, *self._args = args if args else (self._kwargs.pop("hidden_states"),)

    def __call__(self, hidden: Tensor, rows: Tensor | None, state: Any, taken: dict | None = None) -> Tensor:
        """
        The layer's output.

        Args:
            hidden (`torch.Tensor` of shape `(batch, k, width)`): its input.
            rows (`torch.LongTensor` of shape `(batch, k)`, *optional*): which tokens of the call these are; all of
                them if it is not given.
            state: what attention is to do; `None` for what the model does.
            taken (`dict`, *optional*): what others have taken at the same rows, see [`Places`].
        """
        args, kwargs = self._args, self._kwargs
        if rows is not None:
            taken = {} if taken is None else taken
            args, kwargs = (self._at(rows, given, taken) for given in (args, kwargs))
        if state is not None:
            kwargs = {**kwargs, "seek": state}
        output = self.original(hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def peek(self, hidden: Tensor, rows: Tensor | None) -> PeekState:
        """What the layer asks and answers at these rows: its queries and keys."""
        state = PeekState()
        # random numbers that dropout drew here would be missing where a checkpoint computes the layer again
        with torch.no_grad(), evaluating(self.layer):
            self(hidden, rows, state)
        return state

    def _at(self, rows: Tensor, given, taken: dict):
        """Whatever has one entry a token (positions, rotations) at these rows."""
        if isinstance(given, dict):
            return {name: self._at(rows, value, taken) for name, value in given.items()}
        if isinstance(given, (tuple, list)):
            return type(given)(self._at(rows, value, taken) for value in given)
        if not (isinstance(given, Tensor) and given.dim() > 1 and given.shape[1] == self.hidden.shape[1]):
            return given
        if id(given) not in taken:
            # with what it is taken from, so that no other tensor comes to have that identity
            taken[id(given)] = given, self._gather(rows, given)
        return taken[id(given)][1]

    @staticmethod
    def _gather(rows: Tensor, given: Tensor) -> Tensor:
        index = rows.clamp(min=0).view(*rows.shape, *(1 for _ in given.shape[2:])).expand(-1, -1, *given.shape[2:])
        return given.expand(len(rows), *given.shape[1:]).gather(1, index)


class SparseLayer:
    """
    Stands in front of one decoder layer's forward.

    The forward of the layer's class, whatever it is when the layer is called, does all the computing, also the
    checkpointing. Who keeps what is told by the keyword `lemo=`; without it nothing changes.

    Args:
        layer (`nn.Module`): the decoder layer; its instance gets another `forward`.
        index (`int`): its place among the layers.
        sublayers ([`Sublayers`], *optional*): if its MLP runs on all tokens.
        neurons ([`NeuronMlp`], *optional*): if that MLP keeps its largest columns.
        config ([`LemoConfig`]): what becomes of dropped tokens.
        offload ([`Offload`], *optional*): moves what the layer keeps to the host.
    """

    def __init__(
        self,
        layer: nn.Module,
        index: int,
        sublayers: Sublayers | None,
        neurons: NeuronMlp | None,
        config: LemoConfig,
        offload: Offload | None,
    ):
        self.layer, self.index, self.sublayers, self.neurons, self.config = layer, index, sublayers, neurons, config
        self.offload = offload
        self.patch = PatchedForward(layer, self._run, when=lambda: True)

    def undo(self) -> None:
        """Gives the layer its forward back."""
        self.patch.undo()

    def _run(self, original: Callable, args: tuple, kwargs: dict):
        kwargs = dict(kwargs)
        lemo: Elimination | None = kwargs.pop("lemo", None)
        if lemo is None and self.layer.training and torch.is_grad_enabled():
            raise ValueError(
                f"{type(self.layer).__name__} was about to train without LeMo: the model's forward was replaced after "
                "attach(), or its backbone was called directly. Attach by LemoCallback, which goes around a new "
                "forward when a step begins; attach TokenSeek first; or call undo() on the handle."
            )
        if lemo is None:
            return original(*args, **kwargs)
        run = self._run_on_kept if lemo.drops(self.index) else self._run_on_all
        with nullcontext() if self.offload is None else self.offload.of(self.index):
            return run(original, args, kwargs, lemo)

    def _run_on_kept(self, original: Callable, args: tuple, kwargs: dict, lemo: Elimination) -> Tensor:
        call = LayerCall(self.layer, original, args, kwargs)
        places = lemo.places(self.index, call)
        run = self._detach if self.config.mode == "detach" else self._elide
        if self.sublayers is None:
            return run(call, call.hidden, places, lemo)
        with self.sublayers.attention_only():
            hidden = run(call, call.hidden, places, lemo)
        with self.sublayers.mlp_only(), self._counting(call, lemo):
            return call(hidden, None, call.seek)

    def _run_on_all(self, original: Callable, args: tuple, kwargs: dict, lemo: Elimination):
        state = lemo.watching(self.index, kwargs.get("seek"))
        return original(*args, **(kwargs if state is None else {**kwargs, "seek": state}))

    def _counting(self, call: LayerCall, lemo: Elimination) -> AbstractContextManager:
        """Tells the MLP which rows are real tokens."""
        if self.neurons is None:
            return nullcontext()
        real = call.seek.rows >= 0 if isinstance(call.seek, DitchState) else lemo.blocks.segments >= 0
        return recomputed_within(self.layer, partial(self.neurons.counting, real))

    def _elide(self, call: LayerCall, hidden: Tensor, places: Places, lemo: Elimination) -> Tensor:
        if isinstance(call.seek, DitchState):
            # selected among the tokens that every layer keeps
            return call(hidden, None, KeptDitchState(call.seek, places))
        state = KeptState(places) if call.seek is None else KeptScoutState(call.seek, places)
        with split_for(self.layer, hidden, places.rows) as (rest, kept):
            fresh = call(kept, places.rows, state, places.taken)
        # not in place: checkpoints, hooks and output_hidden_states hold what the layer was given
        return join_rows(rest, fresh, places.rows)

    def _detach(self, call: LayerCall, hidden: Tensor, places: Places, lemo: Elimination) -> Tensor:
        scout = ScoutState(lemo.visibility)
        with torch.no_grad(), evaluating(self.layer):
            everything = call(hidden, None, scout)
        ditch = DitchState(scout.kept, places.rows, lemo.visibility)
        with split_for(self.layer, hidden, places.rows) as (rest, kept):
            fresh = hold(call(kept, places.rows, ditch, places.taken), scout)
        return _Exact.apply(join_rows(rest, fresh, places.rows), everything)


class _Exact(torch.autograd.Function):
    """The value of one tensor with the gradient of another, which has come about by other roundings."""

    @staticmethod
    def forward(ctx, computed: Tensor, exact: Tensor) -> Tensor:
        return exact.view_as(exact)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None
