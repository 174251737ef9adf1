"""A small network that says what the paper's score would be, from the means of the blocks alone."""

import json
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..patching import find_layers
from .blocks import Blocks
from .config import LemoConfig
from .scores import askers, looks

WEIGHTS, SHAPES = "lemo_predictor.safetensors", "lemo_predictor.json"
# what of a configuration makes another score of the same hidden states
TARGETS = ("block", "queries", "rope")


def copy_predictor(source: str | Path, target: str | Path) -> None:
    """Puts a saved predictor also into the folder `target`, beside whatever else is there."""
    if Path(source).resolve() == Path(target).resolve():
        return
    Path(target).mkdir(parents=True, exist_ok=True)
    for name in (WEIGHTS, SHAPES):
        shutil.copyfile(Path(source) / name, Path(target) / name)


@dataclass(frozen=True)
class PredictorShape:
    """
    What a predictor was trained for.

    Args:
        layers (`int`): layers of the model.
        width (`int`): its hidden size.
        hidden (`list[list[int]]`): sizes of the two hidden states of each layer's networks, queries' first.
        dim (`int`): size of the vectors that a block is turned into.
        block (`int`), queries (`str`), rope (`bool`): as in the [`LemoConfig`] of its targets.
    """

    layers: int
    width: int
    hidden: list[list[int]]
    dim: int
    block: int
    queries: str
    rope: bool

    @classmethod
    def read(cls, file: Path) -> "PredictorShape":
        """
        Reads what [`Predictor.save`] has written.

        Raises:
            ValueError: something else stands there.
        """
        stored, names = json.loads(file.read_text()), {own.name for own in fields(cls)}
        if not isinstance(stored, dict) or stored.keys() != names:
            raise ValueError(
                f"{file} should have {sorted(names)}, got {sorted(stored)}. Train the predictor anew with "
                "recipes/train_predictor.py."
            )
        return cls(**stored)


class Tower(nn.Sequential):
    """Three matrices with ReLU between them: from a block's mean to a query or a key."""

    def __init__(self, width: int, first: int, second: int, dim: int):
        super().__init__(
            nn.Linear(width, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, dim)
        )

    def remove_units(self, which: int, keep: Tensor) -> None:
        """
        Leaves out hidden units; those that are never positive have added nothing to what follows.

        Args:
            which (`int`): 0 for the first hidden state, 1 for the second.
            keep (`torch.LongTensor` of shape `(units,)`): the units that stay, ascending.
        """
        before, after = self[2 * which], self[2 * which + 2]
        for linear, name, dim in ((before, "weight", 0), (before, "bias", 0), (after, "weight", 1)):
            old = getattr(linear, name)
            setattr(linear, name, nn.Parameter(old.detach().index_select(dim, keep)))
        before.out_features = after.in_features = len(keep)


class Predictor(nn.Module):
    """
    Two small networks a layer, for queries and keys of blocks.

    The score of a block is the sum of products of its key with the queries that may look at it: linear in the number
    of blocks, and independent of the number of tokens in them.

    Args:
        shape ([`PredictorShape`]): sizes, and what it was trained for.
    """

    def __init__(self, shape: PredictorShape):
        super().__init__()
        self.shape = shape
        sizes = [shape.hidden[index : index + 2] for index in range(0, len(shape.hidden), 2)]
        self.towers = nn.ModuleList(
            nn.ModuleList(Tower(shape.width, *own, shape.dim) for own in pair) for pair in sizes
        )

    def scores(self, layer: int, means: Tensor, blocks: Blocks) -> Tensor:
        """
        Scores of a layer's blocks `(batch, blocks)` from their means `(batch, blocks, width)`, float32.

        They are logarithms of the blocks' shares in the paper's score, but for a constant of each document.
        """
        means = means.float()
        # the layer's own norm forgets the length, too
        means = means * torch.rsqrt(means.square().mean(-1, keepdim=True) + 1e-6)
        query, key = (tower(means)[:, None] for tower in self.towers[layer])
        # the mean look: longer sequences, which have more of them, do not make shares more extreme
        return looks(query, key, blocks, self.shape.queries) / askers(blocks, self.shape.queries)

    def save(self, folder: str | Path) -> None:
        """Writes weights and shapes into `folder`, beside whatever else is there, such as an adapter."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: weight.contiguous() for name, weight in self.state_dict().items()}, folder / WEIGHTS)
        (folder / SHAPES).write_text(json.dumps(asdict(self.current_shape()), indent=1) + "\n")

    def current_shape(self) -> PredictorShape:
        """The shape with the hidden units that are left."""
        hidden = [[tower[0].out_features, tower[2].out_features] for pair in self.towers for tower in pair]
        return PredictorShape(**{**asdict(self.shape), "hidden": hidden})

    @classmethod
    def load(cls, folder: str | Path, model: nn.Module, config: LemoConfig) -> "Predictor":
        """
        Reads a predictor.

        Args:
            folder (`str` or `Path`): where it was saved.
            model (`nn.Module`): the causal language model that it is for.
            config ([`LemoConfig`]): what it is to score.

        Raises:
            ValueError: there is none, or it is of another model or for other scores.
        """
        folder = Path(folder)
        if not (folder / WEIGHTS).is_file() or not (folder / SHAPES).is_file():
            raise ValueError(
                f"{folder} has no {WEIGHTS} and {SHAPES}. Train a predictor with recipes/train_predictor.py, or use "
                "score='pooled', which needs none."
            )
        shape = PredictorShape.read(folder / SHAPES)
        layers, width = len(find_layers(model)[1]), model.config.get_text_config().hidden_size
        if (shape.layers, shape.width) != (layers, width):
            raise ValueError(
                f"The predictor in {folder} is of a model with {shape.layers} layers of width {shape.width}, this one "
                f"has {layers} of {width}. Train one for this model."
            )
        own, asked = ({name: getattr(side, name) for name in TARGETS} for side in (shape, config))
        if own != asked:
            raise ValueError(
                f"The predictor in {folder} is for {own}; LeMo is asked for {asked}. Set the same, or train one for "
                "these."
            )
        predictor = cls(shape)
        predictor.load_state_dict(load_file(folder / WEIGHTS))
        return predictor.requires_grad_(False).to(next(model.parameters()).device)
