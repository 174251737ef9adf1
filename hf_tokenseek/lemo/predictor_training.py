"""How a predictor learns the paper's score, loses units it does not need, and is judged."""

import torch
from torch import Tensor, nn

from .blocks import Blocks
from .config import LemoConfig
from .layer import LayerCall
from .predictor import Predictor
from .recording import record
from .scores import Scorer, pool


class Example:
    """
    One micro-batch: what the predictor sees of every layer, and what it should say.

    Args:
        model (`nn.Module`): the plain model, inside of [`recording`].
        inputs (`dict`): a micro-batch.
        config ([`LemoConfig`]): block, queries and rope of the score.

    Attributes:
        means (`list[torch.Tensor]`): of the blocks, a layer each, `(batch, blocks, width)`.
        targets (`list[torch.Tensor]`): the paper's scores, `(batch, blocks)`.
        pooled (`list[torch.Tensor]`): those of `score="pooled"`, which a predictor has to be better than.
        blocks ([`Blocks`]): the blocks.
    """

    def __init__(self, model: nn.Module, inputs: dict, config: LemoConfig):
        self.means: list[Tensor] = []
        self.targets: list[Tensor] = []
        self.pooled: list[Tensor] = []
        scorer = Scorer(config, (0, 0))

        def see(index: int, call: LayerCall, blocks: Blocks) -> None:
            self.blocks = blocks
            self.means.append(pool(call.hidden, blocks).float())
            self.targets.append(scorer.oracle(index, call, blocks).float())
            self.pooled.append(scorer.pooled(index, call, blocks))

        record(model, inputs, config, see)


def ranking_loss(scores: Tensor, targets: Tensor, exists: Tensor) -> Tensor:
    """
    How far the order of the scores is from that of the targets: the cross-entropy between the share of each block in
    the targets and the softmax of the scores (ListNet, https://dl.acm.org/doi/10.1145/1273496.1273513), less its least
    value, so that 0 is perfect.
    """
    wanted = targets.masked_fill(~exists, 0.0)
    wanted = wanted / wanted.sum(1, keepdim=True).clamp(min=1e-30)
    said = scores.masked_fill(~exists, float("-inf")).log_softmax(1).masked_fill(~exists, 0.0)
    return (wanted * (wanted.clamp(min=1e-30).log() - said)).sum(1).mean()


def train_step(predictor: Predictor, optimizer: torch.optim.Optimizer, example: Example) -> float:
    """One update of all layers; returns the mean loss of a layer."""
    losses = [
        ranking_loss(predictor.scores(layer, means, example.blocks), targets, example.blocks.exists)
        for layer, (means, targets) in enumerate(zip(example.means, example.targets, strict=True))
    ]
    optimizer.zero_grad()
    torch.stack(losses).sum().backward()
    optimizer.step()
    return torch.stack(losses).mean().item()


@torch.no_grad()
def recall(predictor: Predictor, example: Example, keep: float) -> list[float]:
    """
    Which share of the blocks that the paper's score would keep the predictor keeps, layer by layer.

    Blocks drawn blindly would have a recall of about `keep`.
    """
    scores = [predictor.scores(layer, means, example.blocks) for layer, means in enumerate(example.means)]
    return agreement(scores, example, keep)


def agreement(scores: list[Tensor], example: Example, keep: float) -> list[float]:
    """The same of any scores of the layers' blocks, each `(batch, blocks)`."""
    return [_agreement(*pair, example.blocks, keep) for pair in zip(scores, example.targets, strict=True)]


def _agreement(scores: Tensor, targets: Tensor, blocks: Blocks, keep: float) -> float:
    shares = []
    for row, count in enumerate(blocks.counts):
        kept = max(1, int(keep * count))
        guessed, best = (set(own[row, :count].topk(kept).indices.tolist()) for own in (scores, targets))
        shares.append(len(guessed & best) / kept)
    return sum(shares) / len(shares)


class ZeroCounter:
    """
    Counts how often hidden units are zero behind their ReLU, while it is open and gradients are on.

    Args:
        predictor ([`Predictor`]): the predictor in training.
    """

    def __init__(self, predictor: Predictor):
        self._units = [(tower, which) for pair in predictor.towers for tower in pair for which in (0, 1)]
        self._forget()
        self._hooks = [
            tower[2 * which + 1].register_forward_hook(self._counts(place))
            for place, (tower, which) in enumerate(self._units)
        ]

    def close(self) -> None:
        """Stops counting."""
        for hook in self._hooks:
            hook.remove()

    def prune(self, optimizer: torch.optim.Optimizer, share: float) -> int:
        """
        Removes the units that were zero in at least `share` of the blocks seen so far; counts from zero again.

        The optimizer goes on with the parameters that are left, and with their part of its state.

        Returns:
            `int`: how many units are gone.
        """
        removed = 0
        for (tower, which), zeros, seen in zip(self._units, self._zeros, self._seen, strict=True):
            if not seen:
                continue
            stays = zeros < share * seen
            keep = stays.nonzero().flatten() if stays.any() else zeros.argmin()[None]
            removed += len(zeros) - len(keep)
            before, after = tower[2 * which], tower[2 * which + 2]
            old = [before.weight, before.bias, after.weight]
            tower.remove_units(which, keep)
            new = [before.weight, before.bias, after.weight]
            for was, now, dim in zip(old, new, (0, 0, 1), strict=True):
                _exchange(optimizer, was, now, dim, keep)
        self._forget()
        return removed

    def state_dict(self) -> dict[str, list]:
        """What has been counted, to go on from."""
        return {"zeros": self._zeros, "seen": self._seen}

    def load_state_dict(self, state: dict[str, list]) -> None:
        """Goes on from `state`."""
        self._zeros, self._seen = state["zeros"], state["seen"]

    def _forget(self) -> None:
        # one count for each unit of a hidden state, and how many blocks the state has seen
        self._zeros = [tower[2 * which].bias.new_zeros(tower[2 * which].out_features) for tower, which in self._units]
        self._seen = [0] * len(self._units)

    def _counts(self, place: int):
        def hook(module, args, output: Tensor) -> None:
            if torch.is_grad_enabled():
                flat = output.detach().flatten(0, -2)
                self._zeros[place] += (flat == 0).sum(0)
                self._seen[place] += len(flat)

        return hook


def _exchange(optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter, dim: int, keep: Tensor) -> None:
    """Puts a parameter into an optimizer in place of the one it is a part of."""
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
    if (state := optimizer.state.pop(old, None)) is not None:
        optimizer.state[new] = {
            name: value.index_select(dim, keep) if isinstance(value, Tensor) and value.shape == old.shape else value
            for name, value in state.items()
        }
