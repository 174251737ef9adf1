"""TokenSeek on one model instance: attach, train a micro-batch, report, undo."""

import inspect
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ..forwarding import autocast, mixed_precision, named_inputs
from ..parameters import trained_share
from ..patched_forward import PatchedForward, leads_to, patched_by, trains
from ..patching import check_one_device, find_causal_lm
from .adapters import check_adapters
from .attention import leave_attention, original_attention, use_attention
from .batch import Batch, Sizes
from .config import AUTO, SeekConfig
from .cost import Cost
from .heads import FusedHead, LossHead, check_loss
from .metrics import SeekMetrics, Trained
from .micro_batch import count_items, read, train_plainly, train_selected
from .passes import Decoder
from .probe import compare_gradients
from .ranks import mean_over_ranks


class SeekHandle:
    """
    Patches a model instance so that its training forward scouts, scores, selects and ditches, and returns the loss.

    Args:
        model (`nn.Module`): a supported causal language model, possibly inside PEFT.
        config ([`SeekConfig`]): what to select.

    Attributes:
        config ([`SeekConfig`]): the same, with the defaults that depend on the model.
        selection (`torch.LongTensor` of shape `(batch, k)`): rows of the last training forward, -1 padded.
        metrics ([`SeekMetrics`]): what was measured since they were last read.
        autocast (`torch.dtype`, *optional*): to compute under where nobody outside of the forward sees to it.
        observers (`list[Callable]`):
            Each is called with the [`Batch`] and what was [`Trained`] after every training forward. They have to be
            quick: read from no device, keep nothing of what they are given.

    Raises:
        ValueError: the model or its adapters are not supported, or it is attached already.
    """

    def __init__(self, model: nn.Module, config: SeekConfig):
        self.model = find_causal_lm(model)
        if config.ratio == AUTO:
            raise ValueError(
                f"ratio={AUTO!r} is found by a trainer, which knows the data. Pass a number, such as that of "
                "hf_tokenseek.memory.affordable_ratio."
            )
        self.config = config.resolved(trained_share(self.model))
        check_adapters(model, self.model)
        check_loss(self.model)
        check_one_device(self.model)
        self.decoder = Decoder(self.model)
        # before anything of the model is replaced
        self.config.layers(len(self.decoder.layers))
        if patched_by(self.model, SeekHandle):
            raise ValueError("TokenSeek is attached to this model already. Call undo() on the first handle.")
        self.original_attention = original_attention(self.model)
        self.attention = use_attention(self.model, self)
        self.signature = inspect.signature(self.model.forward)
        self.metrics = SeekMetrics()
        self.selection: Tensor | None = None
        self.observers: list[Callable[[Batch, Trained], None]] = []
        self.step, self.micro_step = 0, 0
        self._running = False
        self._patch_forward()
        self._guard = self._refuse_bypass()

    def begin_step(self, step: int) -> None:
        """Tells which optimizer step the coming micro-batches belong to: it seeds all that is random."""
        self.step, self.micro_step = step, 0

    def resume(self) -> None:
        """Attaches again after [`undo`]; otherwise goes around what has replaced the model's forward since."""
        if not self.patch.active or not leads_to(self.model.forward, self.patch.forward):
            self.patch.undo()
            self._patch_forward()
        use_attention(self.model, self)
        if self._guard is None:
            self._guard = self._refuse_bypass()

    def undo(self) -> None:
        """Gives the model its own attention and forward back, until [`resume`]."""
        leave_attention(self.model, self)
        self.patch.undo()
        if self._guard is not None:
            self._guard.remove()
        self._guard = None

    def train_forward(self, seek_sizes: Sizes | None = None, fused: Callable | None = None, lemo=None, **inputs):
        """
        The training forward of the patched model.

        Args:
            seek_sizes ([`Sizes`], *optional*): planned beforehand; otherwise read from labels and mask.
            fused (`Callable`, *optional*): the forward with trl's fused head, if its output is asked for.
            lemo ([`Elimination`], *optional*): which tokens the layers run on.
            inputs: what the model's forward takes.

        Returns:
            `transformers.modeling_outputs.CausalLMOutputWithPast` with `loss` only, or the output of trl's fused head.

        Raises:
            ValueError: there are no labels, or an argument that TokenSeek cannot select rows of.
        """
        batch, plain_inputs = read(inputs, self.config, self.model.config.model_type, seek_sizes)
        batch.lemo = lemo
        cost = Cost.of(self.model)

        def train(plainly: bool, head: LossHead | FusedHead):
            if plainly:
                return train_plainly(self.decoder, batch, plain_inputs, head)
            return train_selected(self.decoder, batch, self.config, head, self.step, self.micro_step)

        loss_head = LossHead(self.decoder)
        if self.config.probe_steps and self.micro_step == 0 and self.step % self.config.probe_steps == 0:
            with torch.random.fork_rng():
                self.metrics.probe(compare_gradients(self.model, lambda plainly: train(plainly, loss_head).loss))
        head = loss_head if fused is None else FusedHead(fused, self.decoder.backbone, batch.shape[1])
        share = mean_over_ranks(batch.sizes.rows / batch.shape[1], batch.targets.device)
        done = train(self.config.plain_fallback and share >= cost.break_even, head)
        self.micro_step += 1
        self.selection = done.selection.rows
        self.metrics.observe(batch, done, cost, asked=self.config.is_everything)
        for observe in self.observers:
            observe(batch, done)
        return head.answer(done.loss / count_items(inputs.get("num_items_in_batch"), batch))

    def swapped(self) -> str:
        """A table of what was swapped where."""
        config = self.config
        budget = f"ratio={config.ratio}" if config.ratio else f"labelled={config.labelled}, context={config.context}"
        name = type(self.model).__name__
        return (
            f"TokenSeek on {name}: {budget}, score={config.score}\n"
            f"  attention   {self.original_attention} -> {self.attention} in {len(self.decoder.layers)} layers "
            "(attention dropout off, scouting without dropout)\n"
            f"  forward     {name}.forward of this instance, in training with labels"
        )

    def report(self) -> str:
        """What was swapped where, and what the last micro-batch selected and cost."""
        return "\n".join([self.swapped(), *self.metrics.describe()])

    def _patch_forward(self) -> None:
        self.patch = PatchedForward(self.model, self._train_forward, when=partial(trains, self.model))
        self.autocast = mixed_precision(self.model)

    # a compiled model trains the same, this forward uncompiled
    @torch.compiler.disable
    def _train_forward(self, original: Callable, args: tuple, kwargs: dict):
        named = named_inputs(self.signature, args, kwargs)
        fused = original if named.pop("fused_lm_head", False) else None
        self._running = True
        try:
            with autocast(self.model.device, self.autocast):
                return self.train_forward(fused=fused, **named)
        finally:
            self._running = False

    def _refuse_bypass(self):
        """A hook that stops a training forward which has found its way to the backbone without TokenSeek."""

        def guard(backbone: nn.Module, args: tuple, kwargs: dict) -> None:
            # a copy of the model has the hook, too
            own = backbone is self.decoder.backbone
            known = self._running or "seek" in kwargs or not (own and self.patch.active)
            if not known and backbone.training and torch.is_grad_enabled():
                raise ValueError(
                    f"{type(self.model).__name__} was about to train without TokenSeek: its forward was replaced "
                    "after attach() (trl's trainers do that), or its backbone was called directly. Attach by "
                    "SeekCallback, which goes around a new forward when training starts, or call undo() on the handle."
                )

        return self.decoder.backbone.register_forward_pre_hook(guard, with_kwargs=True)
