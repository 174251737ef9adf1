"""MLPs in tiles of rows: what a layer holds inside its MLP is one tile's."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# under the name that transformers' modules have for theirs: who holds true in a layer's forward then holds in backward
CHECKPOINT = {"_gradient_checkpointing_func": partial(checkpoint, use_reentrant=False)}


def tiled(forward: Callable[[nn.Module, Tensor], Tensor], tiles: int) -> Callable[[nn.Module, Tensor], Tensor]:
    """
    The forward of an MLP, over one tile of its rows after the other; backward computes each tile again.

    Keeps the input alone: `H` numbers a row, of an MLP `H` wide. Exact but for the order in which the weights'
    gradients are summed. The number of tiles is fixed, whatever the number of rows, because the ranks of ZeRO-3 have
    to call their layers equally often; tiles may therefore be empty.

    Method: [ALST](https://huggingface.co/papers/2506.13996), section 3.1.

    Args:
        forward (`Callable`): `(module, hidden_states) -> output`, of the same leading shape; the module's variables
            have to hold [`CHECKPOINT`].
        tiles (`int`): how many.
    """

    def run(self: nn.Module, hidden_states: Tensor) -> Tensor:
        compute = partial(forward, self)
        if torch.is_grad_enabled():
            compute = partial(self._gradient_checkpointing_func, compute)
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        return torch.cat([compute(tile) for tile in rows.tensor_split(tiles)]).view(hidden_states.shape)

    run.tiles = tiles
    return run
