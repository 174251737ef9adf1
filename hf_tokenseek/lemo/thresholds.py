"""The paper's Algorithm 1: a threshold for each layer, by finite differences of the loss on held-out text."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..files import written_whole
from ..patching import evaluating, find_causal_lm, find_layers
from .attach import LemoHandle
from .config import LemoConfig

# numbers of each weight that tell one model from another: training changes them all
PEEKED = 64


def search_thresholds(
    model: nn.Module,
    held_out: Sequence[dict],
    config: LemoConfig,
    record: str | Path,
    step: float = 0.1,
    rate: float = 1.0,
    passes: int = 1,
    progress: bool = True,
) -> LemoConfig:
    """
    Finds a threshold for each layer that drops tokens, in units of the mean score of a sequence.

    It begins at 1, the mean, as the paper does. Then, layer by layer, the threshold moves against the slope of the
    sparse model's loss on `held_out` (the paper: along that of its accuracy), taken between `step` above and below.
    What the paper leaves open (step, rate, passes) are arguments here.

    Args:
        model (`nn.Module`): a supported causal language model.
        held_out (`Sequence[dict]`): micro-batches with `labels` that the model is not trained with.
        config ([`LemoConfig`]): with `bounds`; its `thresholds` are found.
        record (`str` or `Path`): file that gets every evaluation (layer, threshold, loss); a search that was
            interrupted goes on from it, with the same weights and the same batches.
        step (`float`, *optional*, defaults to 0.1): distance of the two evaluations of a layer from its threshold.
        rate (`float`, *optional*, defaults to 1.0): how far a threshold moves for a slope of one.
        passes (`int`, *optional*, defaults to 1): how often each layer is visited.
        progress (`bool`, *optional*, defaults to `True`): whether to show a bar.

    Returns:
        [`LemoConfig`]: the same with `thresholds`.

    Raises:
        ValueError: there is nothing to measure with, thresholds do not move the loss, or `record` is of another
            search.
    """
    if step <= 0:
        raise ValueError(f"`step` should be above 0, got {step}.")
    if config.mode == "detach":
        raise ValueError("The loss of mode='detach' is exact whatever the thresholds are. Search with mode='elide'.")
    if not held_out:
        raise ValueError("search_thresholds() got no held-out micro-batches to measure the loss with.")
    layers = len(find_layers(find_causal_lm(model))[1])
    config = replace(config, thresholds=[1.0] * layers)
    visits = [layer for layer, share in enumerate(config.shares(layers)) if share < 1] * passes
    digests = {"batches": _digest(held_out), "model": _digest([dict(model.named_parameters())], PEEKED)}
    search = {"config": asdict(config), "step": step, "rate": rate, "passes": passes, **digests}
    evaluations = _Evaluations(Path(record), search)
    thresholds = config.thresholds
    for number, layer in enumerate(tqdm(visits, "thresholds", disable=not progress)):
        above, below = thresholds[layer] + step, max(0.0, thresholds[layer] - step)
        found = []
        for place, moved in enumerate((above, below)):
            tried = [*thresholds[:layer], moved, *thresholds[layer + 1 :]]
            measure = partial(_loss, model, held_out, config, tried)
            found.append(evaluations.loss(2 * number + place, layer, moved, measure))
        thresholds[layer] = max(0.0, thresholds[layer] - rate * (found[0] - found[1]) / (above - below))
    return replace(config, thresholds=thresholds)


def _loss(model: nn.Module, held_out: Sequence[dict], config: LemoConfig, thresholds: list[float]) -> float:
    """Mean loss of the sparse model over all labels: with `loss="kept"` thresholds would choose what is counted."""
    handle = LemoHandle(model, replace(config, thresholds=thresholds, loss="all"))
    try:
        with handle.everywhere(), torch.no_grad(), evaluating(model):
            return sum(model(**inputs).loss.item() for inputs in held_out) / len(held_out)
    finally:
        handle.undo()


def _digest(mappings: Sequence[dict], most: int | None = None) -> str:
    """Of all tensors in the mappings, or of so many numbers at the begin of each."""
    found = hashlib.sha256()
    for mapping in mappings:
        for name, tensor in mapping.items():
            if isinstance(tensor, Tensor):
                numbers = tensor.detach().flatten()[:most].cpu().contiguous().view(torch.uint8)
                found.update(f"{name} {tuple(tensor.shape)}".encode() + numbers.numpy().tobytes())
    return found.hexdigest()


class _Evaluations:
    """Evaluations in their order, on disk after each of them."""

    def __init__(self, file: Path, search: dict):
        # as it is read again: JSON has no tuples
        self.file, self.search, self.known = file, json.loads(json.dumps(search)), []
        if file.exists():
            stored = json.loads(file.read_text())
            if stored["search"] != self.search:
                raise ValueError(f"{file} is of another search: {stored['search']}. Name another file for `record`.")
            self.known = stored["evaluations"]

    def loss(self, number: int, layer: int, threshold: float, measure: Callable[[], float]) -> float:
        if number == len(self.known):
            self.known.append({"layer": layer, "threshold": threshold, "loss": measure()})
            with written_whole(self.file) as scratch:
                stored = {"search": self.search, "evaluations": self.known}
                scratch.write_text(json.dumps(stored, indent=1) + "\n")
        return self.known[number]["loss"]
