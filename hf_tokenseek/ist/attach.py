"""Sparse tuning on one model instance: gates on its layers, draws, probes, report, take back."""

import inspect
import time
from collections.abc import Iterable
from dataclasses import asdict

import torch
from torch import nn

from ..forwarding import autocast, mixed_precision, named_inputs
from ..parameters import numel_of
from ..patched_forward import patched_by
from ..patching import find_causal_lm, find_layers
from ..seek.ranks import mean_over_ranks
from .config import LEARNED, IstConfig
from .gates import Gate, trained_parameters, tuners
from .optimizer_state import StateKeeper, keeper_of
from .policies import Policy
from .suppression import Prober
from .telemetry import Telemetry, heat_map
from .zero import ZeroStateKeeper

STATE_VERSION = 1
# children of a backbone that come after its layers
_AFTER_LAYERS = ("norm", "final_layernorm", "final_layer_norm", "final_norm", "ln_f")


class IstHandle:
    """
    Trains some of a model's decoder layers at a time.

    Args:
        model (`nn.Module`): a supported causal language model, possibly inside PEFT.
        config ([`IstConfig`]): how many layers, which, for how long.

    Attributes:
        attached_to (`nn.Module`): the model as it was given; importance is learned in calls of this module.
        active (`list[int]`): the decoder layers that train now, ascending.
        history (`list[tuple[int, list[int]]]`): step of each draw, and the layers drawn.
        policy ([`Policy`]): draws; knows layers with trained weights only, by their place in `trained`.
        trained (`list[int]`): the decoder layers with trained weights.
        telemetry ([`Telemetry`]): figures since they were last read.

    Raises:
        ValueError: the model is not supported or attached already, none of its layers trains, or the policy does not
            fit it.
    """

    def __init__(self, model: nn.Module, config: IstConfig):
        self.attached_to, self.model, self.config = model, find_causal_lm(model), config
        _, self.layers = find_layers(self.model)
        if any(patched_by(layer, Gate) for layer in self.layers):
            raise ValueError("Sparse tuning is attached to this model already. Call undo() on the first handle.")
        self.trained = [index for index, layer in enumerate(self.layers) if trained_parameters(layer)]
        check_layers(self.model, self.layers, self.trained, config)
        self.policy = Policy(config, len(self.trained))
        self.telemetry, self.history = Telemetry(), []
        self.keeper: StateKeeper | ZeroStateKeeper | None = None
        self.step, self._scored_step = 0, 0
        self._frozen = self._freeze_outside()
        self._gates = [Gate(layer) for layer in self.layers]
        self._signature = inspect.signature(model.forward)
        self._hooks = [model.register_forward_pre_hook(self._before_forward, with_kwargs=True)]
        self._hooks += self._weight_gradients()
        self._below_trains = any(p.requires_grad for p in self._outside(below=True))
        self.active: list[int] = []
        self._probabilities: list[float] = []
        self._draw()

    def begin_step(self, step: int) -> None:
        """Tells which optimizer step the coming micro-batches belong to; draws where a new period begins."""
        self.step = step
        if step // self.config.period != self.history[-1][0] // self.config.period:
            self._draw()
        if self.keeper is not None:
            self.keeper.begin_step()

    def manage(self, optimizer) -> None:
        """
        Hands over the optimizer, whose state follows the layers from now on.

        Args:
            optimizer (`torch.optim.Optimizer`): has the parameters of all layers.

        Raises:
            ValueError: it misses a layer, whose weights would never train, or DeepSpeed has flattened layers together.
        """
        self.keeper = keeper_of(optimizer, self.config.state)
        known = self.keeper.known
        for index in self.trained:
            if any(id(p) not in known for p in trained_parameters(self.layers[index])):
                raise ValueError(
                    f"The optimizer does not have all parameters of layer {index}, which would never train. Attach "
                    "first and build the optimizer from the parameters that ask for a gradient; to train again, build "
                    "a new trainer."
                )
        self.keeper.check(trained_parameters(self.layers[index]) for index in self.trained)
        self._activate(self.active, self._probabilities)

    def observe_gradients(self) -> None:
        """Looks at the gradients before they are used, for the policy that goes by their norms."""
        if self.config.policy != "gradient_norm":
            return
        norms = {}
        for index in self.active:
            grads = [p.grad for p in self.layers[index].parameters() if p.grad is not None]
            if grads:
                norm = torch.stack([_whole(part) for part in torch._foreach_norm(grads)]).norm()
                norms[self.trained.index(index)] = mean_over_ranks(float(norm), norm.device)
        self.policy.observe_norms(norms)

    def undo(self) -> None:
        """Gives the model its own forwards back, and the optimizer the state that was offloaded."""
        for gate in reversed(self._gates):
            gate.undo()
        for hook in self._hooks:
            hook.remove()
        for parameter in self.frozen:
            parameter.requires_grad_(True)
        if self.keeper is not None:
            self.keeper.close()

    @property
    def frozen(self) -> set[nn.Parameter]:
        """Weights outside of the layers that trained before, and do not as long as this is attached."""
        parameters = dict(self.model.named_parameters())
        return {parameters[name] for name in self._frozen}

    def trained_bytes(self, layers: Iterable[int] | None = None) -> int:
        """Bytes of all weights that train in a period, by default the present one; those outside of layers too."""
        own = self.active if layers is None else layers
        outside = [p for p in self._outside() if p.requires_grad]
        return sum(numel_of(p) * p.element_size() for p in [*self._parameters_of(own), *outside])

    def metrics(self, reset: bool = True) -> dict[str, float]:
        """What is trained now, and the figures of [`Telemetry`]."""
        state = {} if self.keeper is None else {"ist/optimizer_mib": self.keeper.bytes() / 2**20}
        trained_mib = self.trained_bytes() / 2**20
        return {
            "ist/lowest_layer": float(self.active[0]),
            "ist/gradient_predicted_mib": trained_mib,
            "ist/optimizer_predicted_mib": 2 * trained_mib,
            **state,
            **self.telemetry.read(reset),
        }

    def swapped(self) -> str:
        """A table of what trains when, and what that takes."""
        config, size = self.config, self.policy.size
        dense, mine = self.trained_bytes(self.trained) / 2**20, self.trained_bytes() / 2**20
        outside = "train too" if any(p.requires_grad for p in self._outside()) else "are frozen"
        return (
            f"Sparse tuning of {type(self.model).__name__}: {size} of {len(self.trained)} layers train for "
            f"{config.period} steps, policy={config.policy}, state={config.state}\n"
            f"  weights outside of the layers {outside}; nothing is saved below the lowest active layer: "
            f"{'no' if self._below_trains else 'yes'}\n"
            f"  gradients         {dense:9.2f} -> {mine:9.2f} MiB a period\n"
            f"  AdamW's moments   {2 * dense:9.2f} -> {2 * (dense if config.state == 'keep' else mine):9.2f} MiB\n"
            f"  active layers     {self.active}"
        )

    def report(self) -> str:
        """The table, what is known about the layers, and who trained when."""
        lines = [self.swapped()]
        if self.policy.learns:
            values = (f"{i}: {v:+.2f}" for i, v in zip(self.trained, self.policy.importance.values, strict=True))
            lines.append(f"  importance        {', '.join(values)}")
        return "\n".join([*lines, heat_map(self.history, self.trained)])

    def state_dict(self) -> dict:
        """What the coming steps depend on, beside weights and the optimizer's state."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        offloaded = {} if self.keeper is None else self.keeper.offloaded
        return {
            "version": STATE_VERSION,
            "config": asdict(self.config),
            "trained": self.trained,
            "history": self.history,
            "probabilities": self._probabilities,
            "scored_step": self._scored_step,
            "policy": self.policy.state_dict(),
            "offloaded": {names[id(p)]: state for p, state in offloaded.items()},
        }

    def load_state_dict(self, state: dict) -> None:
        """
        Goes on where [`state_dict`] was taken; the optimizer has been handed over before.

        Raises:
            ValueError: it is of another version, configuration or model.
        """
        own = asdict(self.config)
        if state["version"] != STATE_VERSION or state["config"] != own:
            changed = [name for name in own if own[name] != state["config"].get(name)]
            raise ValueError(
                f"The state is of another configuration of sparse tuning: {changed or 'version'} differ. Resume with "
                f"the configuration that it was saved with: {state['config']}."
            )
        if state["trained"] != self.trained:
            raise ValueError(
                f"The state is of another model: layers {state['trained']} train there, {self.trained} here."
            )
        parameters = dict(self.model.named_parameters())
        if self.keeper is not None:
            self.keeper.offloaded = {parameters[name]: kept for name, kept in state["offloaded"].items()}
        self.policy.load_state_dict(state["policy"])
        self._scored_step = state["scored_step"]
        self.history = [(step, list(layers)) for step, layers in state["history"]]
        self._activate(self.history[-1][1], state["probabilities"])
        if self.keeper is not None and self.config.state == "free":
            # sharded checkpoints hold zeros in place of what is missing
            self.keeper.deselect(self._parameters_of(set(self.trained) - set(self.active)))

    def _draw(self) -> None:
        drawn, chances = self.policy.draw(self.step)
        layers = [self.trained[k] for k in drawn]
        leaving, joining = set(self.active) - set(layers), set(layers) - set(self.active)
        gone = self._parameters_of(leaving)
        for parameter in gone:
            parameter.grad = None
        if self.keeper is not None:
            self.keeper.deselect(gone)
            self.keeper.select(self._parameters_of(joining))
        self.history.append((self.step, layers))
        self._activate(layers, chances)

    def _parameters_of(self, layers: Iterable[int]) -> list[nn.Parameter]:
        return [parameter for index in sorted(layers) for parameter in trained_parameters(self.layers[index])]

    def _activate(self, layers: list[int], probabilities: list[float]) -> None:
        self.active, self._probabilities = layers, probabilities
        for index, gate in enumerate(self._gates):
            gate.idle = index not in layers
            gate.cut = not self._below_trains and index < layers[0]
        if self.keeper is not None:
            self.keeper.hold(self._parameters_of(set(self.trained) - set(layers)))

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Learns from a micro-batch that has not been trained on, once in a step that is due."""
        due = self.step and self.step % self.config.score_steps == 0 and self.step != self._scored_step
        if not (due and self.policy.learns and module.training and torch.is_grad_enabled()):
            return
        began, self._scored_step = time.perf_counter(), self.step
        given, prober = named_inputs(self._signature, args, kwargs), Prober(self.model)
        sets = self.policy.sets(self.step)
        with autocast(self.model.device, mixed_precision(module)):
            losses = [
                prober.loss(given, [self.layers[self.trained[k]] for k in drawn], self.config.beta) for drawn in sets
            ]
        self.policy.importance.update(sets, losses)
        self.telemetry.probed(time.perf_counter() - began)

    def _weight_gradients(self) -> list:
        """Hooks that divide a layer's gradients by the chance it had, so that they are the full ones on average."""
        if not self.config.unbiased:
            return []

        def divide(place: int):
            return lambda grad: grad / self._probabilities[place]

        return [
            parameter.register_hook(divide(place))
            for place, index in enumerate(self.trained)
            for parameter in trained_parameters(self.layers[index])
        ]

    def _freeze_outside(self) -> list[str]:
        """Names, because sharding puts other parameters in their place."""
        if self.config.embeddings:
            return []
        outside = {id(p) for p in self._outside() if p.requires_grad}
        found = {name: p for name, p in self.model.named_parameters() if id(p) in outside}
        for parameter in found.values():
            parameter.requires_grad_(False)
        return list(found)

    def _outside(self, below: bool = False) -> list[nn.Parameter]:
        """Parameters that belong to no layer; with `below` those that the layers' input may depend on."""
        inside = {id(p) for layer in self.layers for p in layer.parameters()}
        backbone = self.model.base_model
        after = {id(p) for name in _AFTER_LAYERS for p in getattr(backbone, name, nn.Module()).parameters()}
        root = backbone if below else self.model
        return [p for p in root.parameters() if id(p) not in inside and not (below and id(p) in after)]


def check_layers(model: nn.Module, layers: nn.ModuleList, trained: list[int], config: IstConfig) -> None:
    """
    Refuses models that the configuration does not fit.

    Raises:
        ValueError: says why, and what to do.
    """
    name = type(model).__name__
    if not trained:
        raise ValueError(f"No decoder layer of {name} has weights that train: there is nothing to choose from.")
    adapters = [tuner for layer in layers for tuner in tuners(layer)]
    if config.policy == "lisa" and adapters:
        raise ValueError(
            f"policy='lisa' trains the layers' own weights, {name} has adapters. Use policy='random', which draws "
            "them the same way."
        )
    if config.policy in LEARNED and any(getattr(tuner, "merged", False) for tuner in adapters):
        raise ValueError(f"policy={config.policy!r} cannot suppress merged adapters. Call unmerge_adapter() first.")
    owners: dict[int, int] = {}
    for index in trained:
        for parameter in trained_parameters(layers[index]):
            if owners.setdefault(id(parameter), index) != index:
                raise ValueError(
                    f"Layers {owners[id(parameter)]} and {index} of {name} share weights: they cannot train one "
                    "without the other."
                )


def _whole(norm: torch.Tensor) -> torch.Tensor:
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
