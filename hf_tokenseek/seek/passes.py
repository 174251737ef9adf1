"""The passes over the decoder: scout (no gradient, all rows), ditch (gradient, selected rows), plain."""

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from tokenseek_kernels import HeadStatistics, head_statistics, linear_cross_entropy

from ..families import BEFORE_HEAD, LOGITS_MULTIPLIED
from ..patched_forward import replaced_forward
from ..patching import evaluating, find_layers
from ..sublayers import Sublayers
from .attention import DitchState, ScoutState
from .batch import IGNORE, Batch
from .config import SeekConfig
from .scores import Score, Scouted
from .select import Selection, labelled_rows, real_rows


class Decoder:
    """
    A causal language model seen as backbone and head.

    Args:
        model (`transformers.PreTrainedModel`): a `...ForCausalLM`.
    """

    def __init__(self, model: nn.Module):
        self.model, self.backbone = model, model.base_model
        config = model.config.get_text_config()
        # granite divides the logits, cohere and hyperclovax multiply them, gemma caps them
        scaling = getattr(config, "logits_scaling", None) or 1.0
        if config.model_type not in LOGITS_MULTIPLIED:
            scaling = 1 / scaling
        self.head_rule = {
            "logit_scale": (getattr(config, "logit_scale", None) or 1.0) * scaling,
            "softcap": getattr(config, "final_logit_softcapping", None),
        }
        before_head = BEFORE_HEAD.get(config.model_type)
        self.before_head = getattr(model, before_head) if before_head else nn.Identity()
        _, self.layers = find_layers(model)
        self.heads = config.num_attention_heads

    def scout(self, batch: Batch, score: Score, config: SeekConfig) -> tuple[ScoutState, Scouted]:
        """Runs all rows without gradient and without dropout; keeps keys and values and what `score` asks for."""
        mass_rows = None
        if score.mass_from is not None:
            mass_rows = real_rows(batch) if score.mass_from == "all" else labelled_rows(batch, config.evidence_queries)
        last = len(self.layers) - 1
        state = ScoutState(batch.visibility, mass_rows, [last] if score.last_block else config.layers(last + 1))
        with torch.no_grad(), evaluating(self.model):
            if score.last_block:
                gradient = self._last_block_gradient(batch, state)
                found = Scouted(state.mass, block_gradient=gradient, heads=self.heads)
            else:
                with nullcontext() if score.head else self._without_last_mlp():
                    hidden = self._run(batch.tokens, batch.positions, state, batch.lemo_inputs)
                head = self._head_statistics(hidden, batch) if score.head else None
                found = Scouted(state.mass, head, heads=self.heads)
        if not state.kept:
            raise ValueError(
                f"{type(self.model).__name__} never called TokenSeek's attention: something replaced its attention "
                "implementation after attach(). Call model.set_attn_implementation before attach(), not after."
            )
        return state, found

    def ditch(self, batch: Batch, scouted: ScoutState, selection: Selection) -> Tensor:
        """Runs the selected rows with gradient; hidden states of shape `(batch, k, hidden)`."""
        state = DitchState(scouted.kept, selection.rows, batch.visibility)
        index = selection.rows.clamp(min=0)
        if batch.tokens.dim() == 3:
            tokens = batch.tokens.gather(1, index[:, :, None].expand(-1, -1, batch.tokens.shape[2]))
        else:
            tokens = batch.tokens.gather(1, index)
        with _scouted_frequencies(self.backbone):
            return self._run(tokens, batch.positions.gather(1, index), state, batch.lemo_inputs)

    def plain(self, inputs: dict) -> Tensor:
        """Runs all rows with gradient, as without TokenSeek; hidden states of shape `(batch, n, hidden)`."""
        return self.before_head(self.backbone(**inputs, use_cache=False)[0])

    def losses(self, hidden: Tensor, targets: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """
        Cross-entropy of the first `count` rows that have a target.

        Args:
            hidden (`torch.Tensor` of shape `(batch, k, hidden)`): final hidden states.
            targets (`torch.LongTensor` of shape `(batch, k)`): -100 where there is no loss.
            count (`int`): how many rows at most have a target; a host number, so that nothing waits for the device.

        Returns:
            `(losses, index)`, both of shape `(count,)`: float32 losses (0 where a target is missing) and the flat
            index of their rows.
        """
        flat = targets.flatten()
        index = (flat == IGNORE).to(torch.int8).sort(stable=True).indices[:count]
        targets = flat.index_select(0, index)

        def losses(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return linear_cross_entropy(rows, weight, targets, bias=bias, **self.head_rule)

        return self._through_head(losses, hidden.flatten(0, 1).index_select(0, index)), index

    def _through_head(self, compute: Callable, rows: Tensor):
        """`compute(rows, weight, bias)`, as the head's own forward: ZeRO-3 and FSDP gather a weight for that long."""
        head = self.model.get_output_embeddings()
        with replaced_forward(head, lambda rows: compute(rows, head.weight, getattr(head, "bias", None))):
            return head(rows)

    def _run(
        self, tokens: Tensor, positions: Tensor, state: ScoutState | DitchState, lemo: dict | None = None
    ) -> Tensor:
        # a 4-D mask is taken as it is by every family: no mask is built, `state` knows who sees whom
        no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=tokens.device)
        name = "inputs_embeds" if tokens.dim() == 3 else "input_ids"
        inputs = {name: tokens, "position_ids": positions, "attention_mask": no_mask}
        return self.before_head(self.backbone(**inputs, **(lemo or {}), use_cache=False, seek=state)[0])

    def _without_last_mlp(self) -> AbstractContextManager:
        """Behind the last keys and values nothing is read: the MLP there need not run, where it can be told apart."""
        try:
            return Sublayers(self.layers[-1]).attention_only()
        except ValueError:
            return nullcontext()

    def _head_statistics(self, hidden: Tensor, batch: Batch) -> HeadStatistics:
        targets = batch.targets.flatten()

        def statistics(rows: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
            return tuple(head_statistics(rows, weight, targets, bias=bias, **self.head_rule))

        found = self._through_head(statistics, hidden.flatten(0, 1))
        return HeadStatistics(*(part.view(batch.shape) for part in found))

    def _last_block_gradient(self, batch: Batch, state: ScoutState) -> Tensor:
        """Gradient of the losses at the input of the last block: only that block and the head are differentiated."""
        found = {}

        def start_here(layer, args, kwargs):
            torch.set_grad_enabled(True)  # ends with the surrounding no_grad
            found["input"] = args[0].detach().requires_grad_()
            return (found["input"], *args[1:]), kwargs

        hook = self.layers[-1].register_forward_pre_hook(start_here, with_kwargs=True)
        try:
            hidden = self._run(batch.tokens, batch.positions, state, batch.lemo_inputs)
        finally:
            hook.remove()
        targets = batch.targets.flatten()

        def frozen(rows: Tensor, *head: Tensor | None) -> Tensor:
            weight, bias = (None if part is None else part.detach() for part in head)
            return linear_cross_entropy(rows, weight, targets, bias=bias, **self.head_rule)

        losses = self._through_head(frozen, hidden.flatten(0, 1))
        gradient = torch.autograd.grad(losses.sum(), found["input"])[0]
        # gemma3n has several residual streams, (streams, batch, n, hidden): to a score they are one wide one
        return gradient if gradient.dim() == 3 else gradient.movedim(0, 2).flatten(2)


@contextmanager
def _scouted_frequencies(backbone: nn.Module):
    """
    Rotary frequencies stay those of the scouting pass.

    Dynamic and LongRoPE embeddings choose them by the largest position they see, which may not be selected.
    """
    rotary = {m: m.rope_type for m in backbone.modules() if isinstance(getattr(m, "rope_type", None), (str, dict))}
    for module, kind in rotary.items():
        module.rope_type = dict.fromkeys(kind, "default") if isinstance(kind, dict) else "default"
    try:
        yield
    finally:
        for module, kind in rotary.items():
            module.rope_type = kind


class _Hold(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, *kept):
        ctx.save_for_backward(*kept)
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx, grad):
        return grad, *(None for _ in ctx.saved_tensors)


def hold(loss: Tensor, scouted: ScoutState) -> Tensor:
    """
    The same loss, with the scouted keys and values as its saved tensors.

    Gradient checkpointing's recompute holds them in a closure that no count of saved tensors sees; saying so here
    keeps every memory figure honest and costs nothing.
    """
    return _Hold.apply(loss, *(tensor for pair in scouted.kept.values() for tensor in pair))
