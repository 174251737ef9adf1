"""Live bytes by kind, by phase and by decoder layer, and what was alive at the peaks."""

import sys
from collections.abc import Iterable
from functools import partial
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from ..patching import find_causal_lm, find_layers
from . import live
from .four_bit import scales_of
from .live import LiveMemory
from .peaks import Label, Peak
from .phases import phase, said
from .saved import SavedActivations

# deep enough to reach from an operator through a model's modules to the training loop
FRAMES = 60


class MemoryTracker(LiveMemory):
    """
    [`LiveMemory`] that knows what is alive: kinds, phases, decoder layers.

    ```python
    with MemoryTracker(model, batch, optimizer=optimizer) as tracker:
        model(**batch).loss.backward()
        optimizer.step()
    print(tracker.peak.kinds, tracker.peak.layers, *tracker.peak.stack(), sep="\\n")
    ```

    - `parameters`: with buffers. `gradients`: from the moment a parameter has one. `optimizer`: its state, from the
      end of the step that makes it. `activations`: from the moment autograd saves them. `temporaries`: all others,
      the batch among them, and what checkpointing computes again.
    - Phases: what [`phase`] says, else `backward` while autograd's engine runs, else `forward`. The step of the
      optimizer is `step`.
    - Layers: of a weight, its gradient and its state the layer it belongs to; of all others the one that ran.

    Nothing changes what is computed. Between entering and leaving, an operator costs about 40 us more.

    Args:
        model (`nn.Module`): what is trained.
        roots: what else is alive before, e.g. the batch.
        optimizer (`torch.optim.Optimizer`, *optional*): whose state and steps are to be told apart.
        parts (`dict[str, int]`, *optional*): kinds of which one of so many parts counts, as of a rank of several.
        inside (`bool`, *optional*, defaults to `True`): whether to look into this library's own operators.

    Attributes:
        peaks (`dict[str, Peak]`): the largest moment of each phase so far.
        saved ([`SavedActivations`]): what autograd has saved, exact to the byte.
    """

    def __init__(
        self,
        model: nn.Module,
        *roots: Any,
        optimizer: torch.optim.Optimizer | None = None,
        parts: dict[str, int] | None = None,
        inside: bool = True,
    ):
        super().__init__(inside=inside)
        self.peaks: dict[str, Peak] = {}
        self.saved = SavedActivations(model, self._save)
        self._model, self._optimizer, self._parts = model, _innermost(optimizer), parts or {}
        self._layers = layers_of(model)
        self._layer_of = {p: index for index, layer in enumerate(self._layers) for p in layer.parameters()}
        self._running: list[int] = []
        self._backward_layer: int | None = None
        self._steps: list = []
        self._hooks: list = []
        self._take_in(roots)

    @property
    def peak(self) -> Peak:
        """The largest moment of all phases."""
        return max(self.peaks.values(), key=lambda peak: peak.bytes)

    @property
    def now(self) -> Peak:
        """What is alive now."""
        return self._picture(None, 0)

    @property
    def phase(self) -> str:
        """The phase that is running."""
        return said() or ("backward" if _in_backward() else "forward")

    def __enter__(self) -> "MemoryTracker":
        for index, layer in enumerate(self._layers):
            self._hooks += [
                layer.register_forward_pre_hook(partial(self._enter_layer, index)),
                layer.register_forward_hook(partial(self._leave_layer, index), always_call=True),
            ]
        for parameter in self._model.parameters():
            if parameter.requires_grad:
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._take_gradient))
        if self._optimizer is not None:
            self._hooks += [
                self._optimizer.register_step_pre_hook(lambda *_: self._steps.append(_entered(phase("step")))),
                self._optimizer.register_step_post_hook(lambda *_: self._end_step()),
            ]
        super().__enter__()
        self.saved.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.saved.__exit__(*error)
        super().__exit__(*error)
        while self._steps:
            self._steps.pop().__exit__(None, None, None)
        for hook in self._hooks:
            hook.remove()
        # dropped, because hooks and tracker would hold each other
        self._hooks = []

    def _take_in(self, roots: Any) -> None:
        """What is there already."""
        for parameter in self._model.parameters():
            for tensor in (parameter, *scales_of(parameter)):
                self._storages.add(tensor, Label("parameters", self._layer_of.get(parameter)))
            self._take_gradient(parameter)
        for buffer in self._model.buffers():
            self._storages.add(buffer, Label("parameters"))
        self._take_state()
        for tensor in tree_iter(roots):
            if isinstance(tensor, Tensor):
                self._storages.add(tensor, Label("temporaries"))
        self.base_bytes = self.bytes

    def _take_gradient(self, parameter: nn.Parameter) -> None:
        if parameter.grad is not None:
            self._storages.relabel(parameter.grad, Label("gradients", self._layer_of.get(parameter)))

    def _take_state(self) -> None:
        for parameter, state in () if self._optimizer is None else self._optimizer.state.items():
            for tensor in tree_iter(state):
                if isinstance(tensor, Tensor):
                    self._storages.relabel(tensor, Label("optimizer", self._layer_of.get(parameter)))

    def _end_step(self) -> None:
        self._take_state()
        # a fused step works in place: no operator has returned anything
        self._observe("optimizer.step", 0)
        self._steps.pop().__exit__(None, None, None)

    def _save(self, tensor: Tensor) -> None:
        kind, layer = self._storages.label(tensor) or Label("temporaries")
        if kind == "temporaries":
            self._storages.relabel(tensor, Label("activations", layer))

    def _enter_layer(self, index: int, module: nn.Module, args: tuple) -> None:
        self._running.append(index)
        if index == 0 and not _in_backward():
            self._backward_layer = None

    def _leave_layer(self, index: int, module: nn.Module, args: tuple, output: Any) -> None:
        self._running.pop()
        output = output[0] if isinstance(output, tuple) else output
        if isinstance(output, Tensor) and output.requires_grad:
            # the gradient of a layer's output comes just before the layer's own backward
            output.register_hook(partial(self._go_back_into, index))

    def _go_back_into(self, index: int, gradient: Tensor) -> None:
        self._backward_layer = index

    def _label(self) -> Label:
        if self._running:
            return Label("temporaries", self._running[-1])
        return Label("temporaries", self._backward_layer if _in_backward() else None)

    def _observe(self, func: Any, temporary_bytes: int) -> None:
        best = self.peaks.get(self.phase)
        if best is None or self._bytes_of_parts() + temporary_bytes > best.bytes:
            self.peaks[self.phase] = self._picture(func, temporary_bytes)

    def _bytes_of_parts(self) -> int:
        if not self._parts:
            return self.bytes
        return sum(self._share(label, size) for label, size in self._storages.by_label.items())

    def _share(self, label: Label, size: int) -> int:
        return -(-size // self._parts.get(label.kind, 1))

    def _picture(self, func: Any, temporary_bytes: int) -> Peak:
        labels = {label: self._share(label, size) for label, size in self._storages.by_label.items() if size}
        if temporary_bytes:
            own = self._label()
            labels[own] = labels.get(own, 0) + temporary_bytes
        return Peak(self.phase, labels, func, _frames())


def _innermost(optimizer: Any) -> torch.optim.Optimizer | None:
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _entered(context: Any) -> Any:
    context.__enter__()
    return context


def _in_backward() -> bool:
    return torch._C._current_autograd_node() is not None


def _frames() -> tuple[tuple[CodeType, int], ...]:
    """Where the operator was called from. Frames themselves would keep tensors alive."""
    frame, found = sys._getframe(1), []
    while frame is not None and len(found) < FRAMES:
        if frame.f_code.co_filename not in (__file__, live.__file__):
            found.append((frame.f_code, frame.f_lineno))
        frame = frame.f_back
    return tuple(found)


def layers_of(model: nn.Module) -> Iterable[nn.Module]:
    """The decoder layers of a supported model, none of any other."""
    try:
        return find_layers(find_causal_lm(model))[1]
    except ValueError:
        # not a decoder that we know: everything lies outside of layers
        return ()
