"""A predictor in training, which survives an interruption, and the figures it is judged by."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hf_tokenseek.files import written_whole
from hf_tokenseek.lemo.predictor import Predictor
from hf_tokenseek.lemo.predictor_training import Example, ZeroCounter, agreement, recall, train_step


class PredictorState:
    """Predictor, optimizer and counts of zeros behind a number of updates.

    Args:
        predictor ([`Predictor`]):
            What is trained.
        steps (`int`):
            Updates that are to be made.
        learning_rate (`float`):
            Of the first update; falls to 0 on a straight line.
    """

    def __init__(self, predictor: Predictor, steps: int, learning_rate: float):
        self.predictor, self.steps, self.learning_rate = predictor, steps, learning_rate
        self.optimizer = torch.optim.Adam(predictor.parameters())
        self.counter = ZeroCounter(predictor)
        self.step = 0

    def update(self, example: Example, prune: float | None) -> float:
        """One update, and the removal of units that were zero in at least the share `prune`; returns the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * (1 - self.step / self.steps)
        loss = train_step(self.predictor, self.optimizer, example)
        self.step += 1
        if prune is not None:
            self.counter.prune(self.optimizer, prune)
        return loss

    def save(self, file: Path, options: dict[str, Any]) -> None:
        """Write everything, and the options that it has come about by; an interruption leaves no half file."""
        stored = {
            "options": options,
            "step": self.step,
            "hidden": self.predictor.current_shape().hidden,
            "predictor": self.predictor.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "counter": self.counter.state_dict(),
        }
        with written_whole(file) as scratch:
            torch.save(stored, scratch)

    def gone_on(self, file: Path) -> "PredictorState":
        """The state that was saved in `file`."""
        device = next(self.predictor.parameters()).device
        stored = torch.load(file, map_location=device, weights_only=True)
        # pruned units are gone from the modules, the optimizer and the counts
        predictor = Predictor(replace(self.predictor.shape, hidden=stored["hidden"])).to(device)
        state = PredictorState(predictor, self.steps, self.learning_rate)
        predictor.load_state_dict(stored["predictor"])
        state.optimizer.load_state_dict(stored["optimizer"])
        state.counter.load_state_dict(stored["counter"])
        state.step = stored["step"]
        return state


def parameters_of(predictor: Predictor) -> int:
    """How many numbers a predictor has."""
    return sum(parameter.numel() for parameter in predictor.parameters())


def judge(fresh: Predictor, trained: Predictor, examples: list[Example], keep: float) -> dict[str, Any]:
    """What a predictor is worth on `examples`.

    Returns:
        `dict[str, Any]`: lists with one value a layer, the share of the blocks that the paper's score would keep which
        are found: `random` (expected of a blind draw), `place` (of those that most queries may look at, which takes
        no model), `pooled`, `before` and `after` training; and `parameters` before and after.
    """
    counts = [count for example in examples for count in example.blocks.counts]
    blind = sum(max(1, int(keep * count)) / count for count in counts) / len(counts)
    found = {
        "random": [[blind] * len(example.means) for example in examples],
        "place": [agreement(_by_place(example, trained.shape.queries), example, keep) for example in examples],
        "pooled": [agreement(example.pooled, example, keep) for example in examples],
        "before": [recall(fresh, example, keep) for example in examples],
        "after": [recall(trained, example, keep) for example in examples],
    }
    means = {name: torch.tensor(rows, dtype=torch.float64).mean(0).tolist() for name, rows in found.items()}
    return {**means, "parameters": [parameters_of(fresh), parameters_of(trained)]}


def _by_place(example: Example, queries: str) -> list[torch.Tensor]:
    """The first blocks are looked at by most others, with `queries="earlier"` the last ones."""
    index = torch.arange(example.blocks.count, dtype=torch.float32, device=example.targets[0].device)
    own = index if queries == "earlier" else -index
    return [own.expand_as(targets) for targets in example.targets]


def table(figures: dict[str, Any]) -> str:
    """[`judge`]'s figures as text, the mean over the layers in the last line but one."""
    names = ("random", "place", "pooled", "before", "after")
    rows = list(zip(*(figures[name] for name in names), strict=True))
    mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    before, after = figures["parameters"]
    return "\n".join(
        [
            f"{'recall':>8}" + "".join(f"{name:>9}" for name in names),
            *(
                f"{label!s:>8}" + "".join(f"{v:9.3f}" for v in row)
                for label, row in [*enumerate(rows), ("mean", mean)]
            ),
            f"parameters: {before:,} before pruning, {after:,} after",
        ]
    )
