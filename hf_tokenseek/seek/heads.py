"""From the hidden states of selected rows to what the caller of the model's forward gets: a loss, or trl's output."""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast

from ..patched_forward import replaced_forward
from .passes import Decoder


class LossHead:
    """
    Answers with the loss, and nothing else.

    Args:
        decoder ([`Decoder`]): whose output embeddings are used.
    """

    def __init__(self, decoder: Decoder):
        self.decoder = decoder

    def __call__(self, hidden: Tensor, rows: Tensor, targets: Tensor, weights: Tensor | None, count: int) -> Tensor:
        """
        The summed loss.

        Args:
            hidden (`torch.Tensor` of shape `(batch, k, hidden)`): final hidden states of the rows.
            rows (`torch.LongTensor` of shape `(batch, k)`): which tokens they are, -1 for empty slots.
            targets (`torch.LongTensor` of shape `(batch, k)`): what they predict, -100 for nothing.
            weights (`torch.FloatTensor` of shape `(batch, k)`, *optional*): factors on their losses.
            count (`int`): how many rows at most have a target.
        """
        losses, index = self.decoder.losses(hidden, targets, count)
        if weights is not None:
            losses = losses * weights.flatten().index_select(0, index)
        return losses.sum()

    def answer(self, loss: Tensor) -> CausalLMOutputWithPast:
        """What the forward returns: `loss` has been divided by the number of items."""
        return CausalLMOutputWithPast(loss=loss)


class FusedHead:
    """
    Answers as trl's fused head does: log-probabilities, entropies and the like of each labelled token, no logits.

    trl's own forward computes them, and so reads temperature, softcap and the fields to return: it asks the backbone
    for hidden states, which it gets from here, and takes shifted labels, which are those of the selected rows. Tokens
    that were not selected come back like tokens without a label: zeros.

    Args:
        forward (`Callable`): the model's forward below TokenSeek, which knows `fused_lm_head=True`.
        backbone (`nn.Module`): the module that this forward asks for hidden states.
        length (`int`): tokens of a sequence.
    """

    def __init__(self, forward: Callable, backbone: nn.Module, length: int):
        self.forward, self.backbone, self.length = forward, backbone, length
        self.output = None

    def __call__(self, hidden: Tensor, rows: Tensor, targets: Tensor, weights: Tensor | None, count: int) -> Tensor:
        """The summed loss; arguments as in [`LossHead`]."""
        answer = BaseModelOutput(last_hidden_state=hidden)
        with replaced_forward(self.backbone, lambda *args, **kwargs: answer):
            output = self.forward(shift_labels=targets, fused_lm_head=True)
        if weights is not None:
            output.log_probs = output.log_probs * weights
        for name in set(output) - {"loss"}:
            output[name] = self._in_place_of_tokens(output[name], rows)
        self.output = output
        return -output.log_probs.sum()

    def answer(self, loss: Tensor):
        """trl's output, its fields of shape `(batch, length - 1)`."""
        self.output.loss = loss
        return self.output

    def _in_place_of_tokens(self, values: Tensor, rows: Tensor) -> Tensor:
        """From `(batch, k)` to one value for each token but the last, which predicts nothing."""
        numbers = values.int() if values.dtype == torch.bool else values
        # empty slots hold a zero, so that it does not matter where they go
        full = numbers.new_zeros(len(rows), self.length).scatter_add(1, rows.clamp(min=0), numbers)
        return full[:, :-1].to(values.dtype)


def check_loss(model: nn.Module) -> None:
    """
    Refuses models with a loss of their own: TokenSeek computes the cross-entropy that the family's class computes.

    Raises:
        ValueError: says which, and the next step.
    """
    forward = inspect.unwrap(type(model).forward)
    own = None
    if vars(model).get("_loss_function", ForCausalLMLoss) is not ForCausalLMLoss:
        own = f"loss_function={model.loss_function!r}"
    elif forward.__module__.partition(".")[0] != "transformers":
        own = f"a forward of its own ({forward.__module__}.{forward.__qualname__})"
    if own is not None:
        raise ValueError(
            f"{type(model).__name__} has {own}, whose loss TokenSeek would not compute. Train the class of "
            "transformers, or turn TokenSeek off (seek=None)."
        )
