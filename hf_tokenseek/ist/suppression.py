"""The loss of a micro-batch with the responses of some layers turned down; nothing is edited, everything is undone."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..forwarding import decoder_inputs
from ..lean.adapters import is_lora
from ..patched_forward import replaced_forward
from ..patching import evaluating
from ..seek.batch import IGNORE
from ..seek.passes import Decoder
from ..seek.ranks import mean_over_ranks
from .gates import tuners, weakened


class Prober:
    """
    Measures losses without gradient, dropout, or all logits at once.

    Args:
        model (`transformers.PreTrainedModel`): a `...ForCausalLM`.
    """

    def __init__(self, model: nn.Module):
        self.model, self.decoder = model, Decoder(model)

    def loss(self, given: dict, suppressed: Iterable[nn.Module] = (), beta: float = 1.0) -> float:
        """
        The mean loss over the labelled tokens of all ranks' micro-batches.

        Args:
            given (`dict`): what the model's forward was given, by name.
            suppressed (`Iterable[nn.Module]`): decoder layers of which `beta` of the response is left.
            beta (`float`, *optional*, defaults to 1.0): how much.

        Raises:
            ValueError: there are no labels.
        """
        targets = _targets(given)
        count = int((targets != IGNORE).sum())
        with torch.no_grad(), evaluating(self.model), turned_down(suppressed, beta):
            hidden = self.decoder.plain(decoder_inputs(given))
            losses, _ = self.decoder.losses(hidden, targets, max(1, count))
        total, number = (mean_over_ranks(float(value), losses.device) for value in (losses.sum(), count))
        return total / number if number else 0.0


def _targets(given: dict) -> Tensor:
    if given.get("shift_labels") is not None:
        return given["shift_labels"]
    if given.get("labels") is None:
        raise ValueError(
            "Learning which layers matter needs `labels` in the model's inputs. Use a policy that learns nothing: "
            "'random', 'lisa', 'round_robin' or 'gradient_norm'."
        )
    return F.pad(given["labels"], (0, 1), value=IGNORE)[:, 1:]


@contextmanager
def turned_down(layers: Iterable[nn.Module], beta: float) -> Iterator[None]:
    """
    Inside the block, `beta` is left of what the layers' adapters add; of what a layer adds where it has none.

    With 1 the block changes nothing.
    """
    with ExitStack() as undo:
        for layer in layers if beta != 1 else ():
            found = tuners(layer)
            for tuner in found:
                undo.enter_context(replaced_forward(tuner, _adapter(tuner, beta)))
            if not found:
                undo.enter_context(replaced_forward(layer, _layer(layer.forward, beta)))
        yield


def _adapter(tuner: nn.Module, beta: float) -> Callable:
    full = tuner.forward

    def forward(x: Tensor, *args, **kwargs) -> Tensor:
        if not is_lora(tuner):
            return weakened(tuner.base_layer(x, *args, **kwargs), full(x, *args, **kwargs), beta)
        # the base layer's output on its way: LoRA adds to it and computes it anyway
        seen: list[Tensor] = []
        hook = tuner.base_layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
        try:
            output = full(x, *args, **kwargs)
        finally:
            hook.remove()
        return weakened(seen[0], output, beta)

    return forward


def _layer(full: Callable, beta: float) -> Callable:
    def forward(hidden: Tensor, *args, **kwargs):
        output = full(hidden, *args, **kwargs)
        if isinstance(output, tuple):
            return weakened(hidden, output[0], beta), *output[1:]
        return weakened(hidden, output, beta)

    return forward
