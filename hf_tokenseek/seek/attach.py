"""TokenSeek on one model instance: attach, train a micro-batch, report, undo."""

import inspect
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from ..families import POSITIONS_FROM_MASK
from ..patching import PatchedForward, find_causal_lm
from .attention import register_attention
from .batch import Batch, Sizes, prepare
from .config import SeekConfig
from .cost import Cost, is_checkpointed
from .metrics import SeekMetrics, Trained
from .passes import Decoder, hold
from .probe import compare_gradients
from .scores import SCORE_FUNCTIONS
from .select import Selection, real_rows, select

# Arguments of a decoder's forward that TokenSeek reads itself.
PER_TOKEN = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "cu_seq_lens_q")
READ = (*PER_TOKEN, "labels", "num_items_in_batch")
# Arguments that say nothing about the loss, or repeat what is read above.
HARMLESS = ("use_cache", "return_dict", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


class SeekHandle:
    """
    Patches a model instance so that its training forward scouts, scores, selects and ditches, and returns the loss.

    Args:
        model (`nn.Module`): a supported causal language model, possibly inside PEFT.
        config ([`SeekConfig`]): what to select.

    Attributes:
        selection (`torch.LongTensor` of shape `(batch, k)`): rows of the last training forward, -1 padded.
        metrics ([`SeekMetrics`]): what was measured since they were last read.
        autocast (`torch.dtype`, *optional*): to compute under where nobody outside of the forward sees to it.

    Raises:
        ValueError: the model is not supported or attached already.
    """

    def __init__(self, model: nn.Module, config: SeekConfig):
        self.model, self.config = find_causal_lm(model), config
        self.decoder = Decoder(self.model)
        self.original_attention = self.model.config._attn_implementation
        if self.original_attention.startswith("tokenseek_"):
            raise ValueError("TokenSeek is attached to this model already. Call undo() on the first handle.")
        self.attention = register_attention(self.original_attention)
        self.model.set_attn_implementation(self.attention)
        self.signature = inspect.signature(self.model.forward)
        self.patch = PatchedForward(self.model, self._train_forward)
        self.metrics = SeekMetrics()
        self.selection: Tensor | None = None
        self.step, self.micro_step = 0, 0
        self.autocast: torch.dtype | None = None

    def begin_step(self, step: int) -> None:
        """Tells which optimizer step the coming micro-batches belong to: it seeds all that is random."""
        self.step, self.micro_step = step, 0

    def pause(self) -> None:
        """Lets the model compute as it did before, until [`resume`]."""
        self.patch.active = False
        self.model.set_attn_implementation(self.original_attention)

    def resume(self) -> None:
        """Goes on after [`pause`]."""
        self.patch.active = True
        self.model.set_attn_implementation(self.attention)

    def undo(self) -> None:
        """Gives the model its own attention and forward back."""
        self.pause()
        self.patch.undo()

    # a compiled model trains the same, this forward uncompiled
    @torch.compiler.disable
    def _train_forward(self, original: Callable, args: tuple, kwargs: dict):
        named = dict(self.signature.bind(*args, **kwargs).arguments)
        further = named.pop("kwargs", {})
        with nullcontext() if self.autocast is None else torch.autocast(self.model.device.type, dtype=self.autocast):
            return self.train_forward(**named, **further)

    def train_forward(self, seek_sizes: Sizes | None = None, **inputs):
        """
        The training forward of the patched model.

        Args:
            seek_sizes ([`Sizes`], *optional*): planned beforehand; otherwise read from labels and mask.
            inputs: what the model's forward takes.

        Returns:
            `transformers.modeling_outputs.CausalLMOutputWithPast` with `loss` only.

        Raises:
            ValueError: there are no labels, or an argument that TokenSeek cannot select rows of.
        """
        from transformers.modeling_outputs import CausalLMOutputWithPast

        batch, plain_inputs = self._read(inputs, seek_sizes)
        cost = Cost.of(self.model)
        plainly = self.config.plain_fallback and batch.sizes.rows / batch.shape[1] >= cost.break_even
        if self.config.probe_steps and self.micro_step == 0 and self.step % self.config.probe_steps == 0:
            with torch.random.fork_rng():
                self.metrics.probe(compare_gradients(self.model, lambda p: self._train(batch, plain_inputs, p).loss))
        done = self._train(batch, plain_inputs, plainly)
        self.micro_step += 1
        self.selection = done.selection.rows
        self.metrics.observe(batch, done, cost)
        return CausalLMOutputWithPast(loss=done.loss / self._items(inputs.get("num_items_in_batch"), batch))

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

    def _read(self, inputs: dict, sizes: Sizes | None) -> tuple[Batch, dict]:
        if inputs.get("labels") is None:
            raise ValueError(
                "TokenSeek needs `labels` in the model's inputs while training. Label smoothing and compute_loss_func "
                "take them away: set label_smoothing_factor=0 and compute_loss_func=None, or undo() TokenSeek."
            )
        unknown = [k for k, v in inputs.items() if k not in READ + HARMLESS and not _is_off(v)]
        if unknown:
            raise ValueError(f"TokenSeek cannot select rows of the arguments {unknown}. It reads {list(READ)}.")
        tokens = inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
        mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
        family = self.model.config.model_type
        batch = prepare(
            self.config,
            tokens,
            inputs["labels"],
            mask,
            positions,
            inputs.get("cu_seq_lens_q"),
            positions_from_mask=family in POSITIONS_FROM_MASK,
            sizes=sizes,
        )
        return batch, {k: inputs[k] for k in (*PER_TOKEN, *HARMLESS[2:]) if inputs.get(k) is not None}

    def _train(self, batch: Batch, plain_inputs: dict, plainly: bool) -> Trained:
        """Forward with gradient of one micro-batch, selected or plain; the loss is a sum."""
        if plainly:
            rows = real_rows(batch)
            # empty slots behind the real ones, as in every selection
            order = (rows < 0).to(torch.int8).sort(stable=True).indices
            weights = torch.ones(batch.shape, device=rows.device)
            everything = Selection(rows.gather(1, order), batch.targets.gather(1, order), weights)
            losses, _ = self.decoder.losses(self.decoder.plain(plain_inputs), batch.targets, sum(batch.sizes.labelled))
            return Trained(losses.sum(), everything, plainly=True)
        generator = torch.Generator().manual_seed(_seed(self.config.seed, self.step, self.micro_step))
        score = SCORE_FUNCTIONS[self.config.score]
        scouted, found = self.decoder.scout(batch, score, self.config.evidence_queries)
        selection = select(score.compute(found, batch, self.config, generator), batch, self.config, generator)
        hidden = self.decoder.ditch(batch, scouted, selection)
        losses, index = self.decoder.losses(hidden, selection.targets, sum(batch.sizes.loss))
        loss = (losses * selection.weights.flatten().index_select(0, index)).sum()
        if is_checkpointed(self.model):
            loss = hold(loss, scouted)
        return Trained(loss, selection, mass=found.mass, kept_bytes=scouted.nbytes)

    @staticmethod
    def _items(items: Tensor | int | None, batch: Batch) -> Tensor | int:
        """What the summed loss is divided by: the Trainer's count over the step, else this micro-batch's labels."""
        if items is None:
            return max(1, sum(batch.sizes.labelled))
        return items.clamp(min=1) if isinstance(items, Tensor) else max(1, items)


def _is_off(value) -> bool:
    return value is None or (isinstance(value, (bool, int)) and not value)


def _seed(*parts: int) -> int:
    """One seed from several integers; different parts give unrelated streams."""
    seed = 0x9E3779B97F4A7C15
    for part in parts:
        seed = (seed ^ part) * 0xBF58476D1CE4E5B9 % 2**63
        seed ^= seed >> 31
    return seed
