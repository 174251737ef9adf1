"""LeMo on one model instance: attach, choose, report, undo."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import compress

import torch
from torch import Tensor, nn

from tokenseek_kernels.dispatch import is_on_gpu

from ..forwarding import named_inputs
from ..patched_forward import PatchedForward, is_reached, patched_by, trains
from ..patching import check_one_device, find_causal_lm, find_layers
from ..seek.attach import SeekHandle
from ..seek.attention import leave_attention, use_attention
from ..seek.batch import IGNORE
from ..seek.cost import is_checkpointed
from ..sublayers import Sublayers
from .blocks import Blocks, Layout
from .config import LemoConfig
from .elimination import Elimination
from .layer import SparseLayer
from .neurons import NeuronMlp, check_form
from .offload import Offload
from .predictor import Predictor
from .refusals import check_model, check_with_seek
from .scores import Scorer
from .telemetry import Telemetry, chosen


class LemoHandle:
    """
    Makes each layer of a model instance run on the tokens it keeps, while the model trains.

    Args:
        model (`nn.Module`): a supported causal language model, possibly inside PEFT.
        config ([`LemoConfig`]): how many tokens, and which.

    Attributes:
        attached_to (`nn.Module`): the model as it was given.
        shares (`list[float]`): share of blocks that each layer keeps (at most, with thresholds).
        elimination ([`Elimination`], *optional*): the choices of the last forward pass.
        offload ([`Offload`], *optional*): what layers keep in the host's memory.
        telemetry ([`Telemetry`]): figures since they were last read.

    Raises:
        ValueError: the model is not supported, or it is attached already.
    """

    def __init__(self, model: nn.Module, config: LemoConfig):
        self.attached_to, self.model, self.config = model, find_causal_lm(model), config
        check_model(self.model)
        check_one_device(self.model)
        _, layers = find_layers(self.model)
        if patched_by(layers[0], SparseLayer):
            raise ValueError("LeMo is attached to this model already. Call undo() on the first handle.")
        self._is_with_seek()
        self.shares = config.shares(len(layers))
        self._predictor = None if config.predictor is None else Predictor.load(config.predictor, self.model, config)
        sublayers = [None if config.mlp == "tokens" else Sublayers(layer) for layer in layers]
        with_neurons = [config.mlp == "neurons" and share < 1 for share in self.shares]
        # whatever refuses the model does so before anything of it is replaced
        for own in compress(sublayers, with_neurons):
            check_form(own.mlp)
        use_attention(self.model, self)
        self.step, self.micro_step = 0, 0
        self.elimination: Elimination | None = None
        self.telemetry = Telemetry()
        self.signature = inspect.signature(self.model.forward)
        self._always = False
        self._neurons = [
            NeuronMlp(own.mlp, config.neurons) if has else None
            for own, has in zip(sublayers, with_neurons, strict=True)
        ]
        self.offload = Offload(config.offload_gib, self.shares) if config.offload_gib else None
        self._layers = [
            SparseLayer(layer, index, *own, config, self.offload)
            for index, (layer, *own) in enumerate(zip(layers, sublayers, self._neurons, strict=True))
        ]
        self._patch_forward()

    @property
    def leaves_out_labels(self) -> bool:
        """Whether labels of tokens that have missed a layer do not count."""
        return self.config.loss == "kept" and self.config.mode == "elide"

    def begin_step(self, step: int) -> None:
        """Tells which optimizer step the coming micro-batches belong to: it seeds all that is random."""
        self.step, self.micro_step = step, 0

    def resume(self) -> None:
        """Goes around whatever has replaced the model's forward since: trl's fused head, or TokenSeek."""
        if not is_reached(self._patch, past=SeekHandle):
            self._patch.undo()
            self._patch_forward()

    def undo(self) -> None:
        """Gives the model its own forwards back."""
        self._patch.undo()
        for patched in reversed([*filter(None, self._neurons), *self._layers]):
            patched.undo()
        leave_attention(self.model, self)

    @contextmanager
    def everywhere(self) -> Iterator[None]:
        """Inside the block layers drop tokens in evaluation, too: what the sparse model is worth."""
        self._always = True
        try:
            yield
        finally:
            self._always = False

    def begin(self, layout: Layout) -> Elimination:
        """Begins the choices of one forward pass over a micro-batch."""
        config, every = self.config, self.config.probe_steps
        training = self._is_training()
        probing = training and bool(every) and self.micro_step == 0 and self.step % every == 0
        if self._predictor is not None:
            # some trainers move the model after their callbacks have attached to it
            self._predictor.to(layout.segments.device)
        scorer = Scorer(config, (self.step, self.micro_step), self._predictor)
        blocks = Blocks(layout.segments, layout.targets, layout.real, config)
        # figures are of training, also where a sparse model is evaluated in between
        telemetry = self.telemetry if training else Telemetry()
        self.elimination = Elimination(blocks, config, self.shares, scorer, layout.simple, telemetry, probing)
        if self.offload is not None:
            self.offload.begin(self.model)
        self.micro_step += 1
        return self.elimination

    @property
    def kept_blocks(self) -> list[list[int]]:
        """How many sequences of the last forward pass kept each block, layer by layer; reads from the device."""
        if self.elimination is None:
            return []
        blocks = self.elimination.blocks
        counts = [
            chosen(kept, blocks.count) if (kept := self.elimination.kept.get(layer)) else blocks.exists
            for layer in range(len(self.shares))
        ]
        return torch.stack(counts).sum(1).tolist()

    def swapped(self) -> str:
        """A table of what runs on how many tokens."""
        config, layers = self.config, len(self.shares)
        how = f"thresholds within {config.bounds}" if config.thresholds is not None else f"keep={config.keep}"
        lines = [
            f"LeMo on {type(self.model).__name__}: {how}, block={config.block}, score={config.score}, "
            f"mode={config.mode}, mlp={config.mlp}"
        ]
        first = 0
        for layer in range(1, layers + 1):
            if layer == layers or self.shares[layer] != self.shares[first]:
                share = self.shares[first]
                does = "all tokens" if share == 1 else f"{share:.3g} of the blocks"
                lines.append(f"  layers {f'{first} to {layer - 1}':10} run on {does}")
                first = layer
        if self.offload is not None:
            parts = sorted(size / 2**20 for size in self.offload.budgets)
            where = "" if is_on_gpu(next(self.model.parameters())) else "; nothing while the model is not on a GPU"
            lines.append(
                f"  up to {config.offload_gib:.4g} GiB of what they keep move to the host, {parts[0]:.4g} to "
                f"{parts[-1]:.4g} MiB of each{where}"
            )
        text = self.model.config.get_text_config()
        if any(getattr(text, name, 0) for name in ("attention_dropout", "attn_pdrop")):
            lines.append("  attention dropout is off in layers that drop tokens")
        saved = "computed without gradient" if config.mode == "detach" else "handed on"
        mean = sum(self.shares) / layers
        lines.append(f"  dropped tokens are {saved}; a layer runs on {mean:.3f} of the tokens on average")
        return "\n".join(lines)

    def report(self) -> str:
        """The table, and the figures since they were last read."""
        figures = [f"  {name} {value:.4g}" for name, value in self.telemetry.read(reset=False).items()]
        return "\n".join([self.swapped(), *figures])

    def _patch_forward(self) -> None:
        self._patch = PatchedForward(self.model, self._forward, when=self._is_wanted)

    def _is_wanted(self) -> bool:
        return self._always or trains(self.model)

    def _is_training(self) -> bool:
        return self.model.training and torch.is_grad_enabled()

    def _is_with_seek(self) -> bool:
        """Whether TokenSeek computes the loss, and selects among what every layer keeps."""
        attached = patched_by(self.model, SeekHandle) is not None
        if attached:
            check_with_seek(self.config)
        return attached

    @torch.compiler.disable
    def _forward(self, original: Callable, args: tuple, kwargs: dict):
        named = named_inputs(self.signature, args, kwargs)
        labels = named.get("labels")
        if labels is None and self.leaves_out_labels and not self._always:
            raise ValueError(
                "LeMo with loss='kept' needs `labels` in the model's inputs while training. Label smoothing and "
                "compute_loss_func take them away: leave those out, or set loss='all' or mode='detach'."
            )
        if named.get("past_key_values") is not None or (self._always and named.get("use_cache")):
            raise ValueError(
                "LeMo's layers keep other tokens each, and got a cache of all (past_key_values, or use_cache=True). "
                "Train without one, and call generate() of the sparse model with use_cache=False."
            )
        if self.offload is not None and is_checkpointed(self.model):
            raise ValueError(
                f"LeMo's offload_gib={self.config.offload_gib} moves what layers keep, and checkpointed ones keep "
                "their inputs only. Set offload_gib=0 and gradient_checkpointing_kwargs={'offload': True}, or turn "
                "gradient checkpointing off."
            )
        layout = Layout.read(named)
        labelled = layout.targets != IGNORE
        elimination = self.begin(layout)
        # a cache would keep keys and values of all layers, and hand them to layers that keep other rows
        named |= {"use_cache": False, "lemo": elimination}
        try:
            if labels is None or (self._is_training() and self._is_with_seek()):
                return original(**named)
            if self.leaves_out_labels:
                output = self._with_kept_labels(original, named, elimination, labelled)
            else:
                output = original(**named)
            # the mean over no labels at all is no number, and what it hands back is zeros
            return output if layout.labelled else _changed(output, named, torch.nan_to_num)
        finally:
            elimination.forget()
            if self.offload is not None and self._is_training():
                self.telemetry.offloaded(self.offload)

    def _with_kept_labels(self, original: Callable, named: dict, elimination: Elimination, labelled: Tensor):
        """The loss of labels that are predicted by tokens which every layer has computed; they stand for all."""
        named["labels"] = labels = named["labels"].clone()
        share = []

        def leave_out(*_) -> None:
            counts = elimination.computed() & labelled
            # a micro-batch that has lost all of its labels keeps them
            counts = torch.where(counts.any(), counts, labelled)
            labels[:, 1:].masked_fill_(~counts[:, :-1], IGNORE)
            share.append(counts.sum() / labelled.sum().clamp(min=1))

        hook = self.model.base_model.register_forward_hook(leave_out)
        try:
            output = original(**named)
        finally:
            hook.remove()
        if not (named.get("fused_lm_head") or named.get("num_items_in_batch") is not None):
            return output
        # what is a sum, or divided by the count of all labels
        counted = share[-1].clamp(min=torch.finfo(torch.float32).tiny)
        return _changed(output, named, lambda loss: loss / counted)


def _changed(output, named: dict, change: Callable[[Tensor], Tensor]):
    """The model's output with another loss; trl adds up what its fused head gives, which has another name."""
    if isinstance(output, tuple):
        return change(output[0]), *output[1:]
    name = "log_probs" if named.get("fused_lm_head") else "loss"
    output[name] = change(output[name])
    return output
