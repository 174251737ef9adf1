"""What a user can choose about TokenSeek."""

from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real

from ..method_config import MethodConfig

SCORES = ("evidence", "context", "gradient", "loss", "entropy", "recent", "random", "hybrid", "paper")
CONTEXT_BIASES = ("none", "count", "harmonic")
GRADIENT_NORMS = ("l2", "l1", "signed")
MIXES = ("rank", "zscore")
# the scores that read an option
READ_BY = {
    "alpha": ("hybrid", "paper"),
    "beta": ("hybrid", "paper"),
    "mix": ("hybrid",),
    "gradient_norm": ("paper",),
    "context_bias": ("context", "hybrid", "paper"),
    "evidence_queries": ("evidence",),
    "attention_layers": ("evidence", "context", "hybrid"),
}
# the scores that are 0 wherever there is no label
OF_LABELS = ("gradient", "loss")
# `ratio` that depends on the memory there is
AUTO = "auto"
# defaults of `context`, and the share of trained weights below which the second one holds
CONTEXT, CONTEXT_OF_ADAPTERS, SMALL_ADAPTER = 0.1, 0.25, 0.1


@dataclass
class SeekConfig(MethodConfig):
    """
    Configuration of TokenSeek: which tokens take part in the backward pass.

    By default the selection has two stages, each sequence on its own: every labelled position (*loss rows*), then the
    share `context` of the other positions that the loss rows attend to most (*evidence rows*). `ratio` replaces both
    stages by the paper's single budget. `context=1.0` (with `labelled=1.0`) and `ratio=1.0` equal plain training.
    Method: [TokenSeek](https://huggingface.co/papers/2601.19739); the two stages and the reuse of the scouting pass
    are this library's.

    Args:
        context (`float`, *optional*):
            Share of the real positions that are not loss rows to keep as evidence, in [0, 1]. Defaults to 0.1, and to
            0.25 where less than a tenth of the weights is trained: the gradient of small adapters depends more on the
            paths through other tokens (docs/evidence/fidelity-long-prompt-*-lora.md).
        labelled (`float`, *optional*, defaults to 1.0):
            Share of the labelled positions to keep as loss rows, in (0, 1]. Below 1 the loss of a sequence is the mean
            over its kept rows, weighted as if all were there.
        ratio (`float` or `"auto"`, *optional*):
            One budget over all real positions, in (0, 1], in place of `context` and `labelled`; by the score
            `"evidence"` labelled ones come first, by others a sequence may lose all of its labels. `"auto"` is, in a
            trainer, the largest one with which a step of the longest sequences fits into `budget_gib`; it is found
            when training starts, by simulating steps (some seconds each for a model of 32 layers).
        budget_gib (`float`, *optional*):
            With `ratio="auto"`: GiB that training may take, weights and optimizer included; 8 % of it are left to what
            cannot be simulated. Defaults to the memory of the device, on a CPU to that of the machine.
        score (`str`, *optional*, defaults to `"evidence"`):
            What decides: `"evidence"` (attention mass received from the labelled queries, all layers and heads),
            `"context"` (the same from all queries), `"gradient"` (gradient norm at the head), `"loss"`, `"entropy"`,
            `"recent"`, `"random"`, `"hybrid"` (`alpha` context + `beta` gradient, normalised by `mix`) or `"paper"`
            (`alpha * log(attention received in the last block) + beta * min-max gradient at the last block's input`).
            `"gradient"` and `"loss"` are 0 without a label, so they need `ratio`, whose budget goes to labelled
            positions first and then to the earliest ones, or a `context` of 0 or 1.
        alpha, beta (`float`, *optional*, defaults to 1.0):
            Weights of the context and gradient terms of `"hybrid"` and `"paper"`.
        mix (`str`, *optional*, defaults to `"rank"`):
            How `"hybrid"` makes its terms comparable: `"rank"` or `"zscore"`.
        gradient_norm (`str`, *optional*, defaults to `"l2"`):
            How `"paper"` reduces the gradient over the hidden size: `"l2"`, `"l1"` or `"signed"`, the sum that the
            paper's equation has, under which a gradient of zero stands in the middle and large ones at both ends.
        context_bias (`str`, *optional*, defaults to `"none"`):
            Correction of the head start that causality gives early tokens in `"context"`, `"hybrid"` and `"paper"`:
            divide by the number of queries that can see the token (`"count"`) or by the mass it would get from uniform
            attention (`"harmonic"`), both as if no layer had a sliding window.
        temperature (`float`, *optional*, defaults to 0.0):
            Above 0 the top-k is stochastic (Gumbel) and the losses carry inverse-probability weights; 1.0 samples in
            proportion to the score.
        evidence_queries (`int`, *optional*, defaults to 64):
            How many labelled queries of a sequence, evenly spaced, vote at most in `"evidence"`; bounds its cost.
        attention_layers (`list[int]`, *optional*):
            Layers whose attention counts in `"evidence"`, `"context"` and `"hybrid"`, all of them if not given; -1 is
            the last one. Fewer make scouting cheaper.
        plain_fallback (`bool`, *optional*, defaults to `True`):
            Train a micro-batch plainly where so many rows are selected that scouting cannot pay.
        probe_steps (`int`, *optional*, defaults to 0):
            Every so many optimizer steps, measure the cosine of the selected gradient with the full gradient of the
            same micro-batch (costs one plain step and two copies of the gradients). 0 turns it off.
        seed (`int`, *optional*, defaults to 0):
            Seed of `"random"` and of the stochastic top-k.

    Raises:
        ValueError: a value lies outside its allowed set, or has no effect beside the others.
    """

    field_name, example = "seek", '{"context": 0.2}'

    context: float | None = field(
        default=None,
        metadata={"help": "Share of unlabelled positions kept as evidence; 0.1, with small adapters 0.25."},
    )
    labelled: float = field(default=1.0, metadata={"help": "Share of labelled positions kept as loss rows."})
    ratio: float | str | None = field(
        default=None, metadata={"help": "The paper's single budget over all positions; auto: what budget_gib affords."}
    )
    budget_gib: float | None = field(default=None, metadata={"help": "GiB that ratio=auto may take."})
    score: str = field(default="evidence", metadata={"help": f"What decides: one of {', '.join(SCORES)}."})
    alpha: float = field(default=1.0, metadata={"help": "Weight of the context term of 'hybrid' and 'paper'."})
    beta: float = field(default=1.0, metadata={"help": "Weight of the gradient term of 'hybrid' and 'paper'."})
    mix: str = field(default="rank", metadata={"help": "How 'hybrid' normalises its terms: rank or zscore."})
    gradient_norm: str = field(default="l2", metadata={"help": "How 'paper' reduces gradients: l2, l1 or signed."})
    context_bias: str = field(default="none", metadata={"help": "Causal-bias correction: none, count or harmonic."})
    temperature: float = field(default=0.0, metadata={"help": "Above 0: stochastic top-k with weighted losses."})
    evidence_queries: int = field(default=64, metadata={"help": "Labelled queries that vote at most in 'evidence'."})
    attention_layers: list[int] | None = field(
        default=None, metadata={"help": "Layers whose attention counts; all of them if not given."}
    )
    plain_fallback: bool = field(default=True, metadata={"help": "Train plainly where scouting cannot pay."})
    probe_steps: int = field(default=0, metadata={"help": "Measure gradient fidelity every so many steps; 0 is off."})
    seed: int = field(default=0, metadata={"help": "Seed of random scores and of the stochastic top-k."})

    def __post_init__(self):
        self._check_kind(Real, "number", "context", "labelled", "budget_gib", "alpha", "beta", "temperature")
        if self.ratio != AUTO:
            self._check_kind(Real, f"number or {AUTO!r}", "ratio")
        self._check_budget()
        self._check_kind(Integral, "whole number", "evidence_queries", "probe_steps", "seed")
        for name in ("context", "labelled", "ratio"):
            value, lowest = getattr(self, name), 0.0 if name == "context" else 1e-9
            if value not in (None, AUTO) and not lowest <= value <= 1.0:
                bound = "[0, 1]" if name == "context" else "(0, 1]"
                raise ValueError(f"`{name}` should be a share in {bound}, got {value}. Use 1.0 for plain training.")
        self._check_allowed("score", SCORES)
        self._check_allowed("mix", MIXES)
        self._check_allowed("gradient_norm", GRADIENT_NORMS)
        self._check_allowed("context_bias", CONTEXT_BIASES)
        self._check_layers()
        if self.evidence_queries < 1:
            raise ValueError(f"`evidence_queries` should be at least 1, got {self.evidence_queries}.")
        for name in ("temperature", "probe_steps"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` should be 0 (off) or positive, got {getattr(self, name)}.")
        self._check_effects()

    def _check_effects(self) -> None:
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        for name in ("context", "labelled"):
            if self.ratio is not None and name in given:
                raise ValueError(
                    f"ratio={self.ratio!r} is one budget over all positions and does not read {name}={given[name]}. "
                    f"Leave `{name}` out for one budget, `ratio` for loss rows and evidence rows."
                )
        for name, scores in READ_BY.items():
            if name in given and self.score not in scores:
                raise ValueError(
                    f"{name}={given[name]!r} has no effect with score={self.score!r}. Leave it out, or use a score "
                    f"that reads it: {list(scores)}."
                )
        if self.score in OF_LABELS and self.ratio is None and self.context not in (0, 1):
            raise ValueError(
                f"score={self.score!r} says nothing of positions without a label, so it cannot choose evidence rows. "
                "Set context=0 to do without them, ratio= for one budget over all positions, or another score, such "
                "as 'evidence'."
            )

    def _check_layers(self) -> None:
        layers = self.attention_layers
        if layers is None:
            return
        numbers = isinstance(layers, list) and all(isinstance(n, int) and not isinstance(n, bool) for n in layers)
        if not numbers or not layers:
            raise ValueError(f"`attention_layers` should be a list of whole numbers, got {layers!r}. None means all.")

    def _check_budget(self) -> None:
        if self.budget_gib is None:
            return
        if self.ratio != AUTO:
            raise ValueError(f"`budget_gib` needs ratio={AUTO!r}, got ratio={self.ratio}. Set it, or leave it out.")
        if not self.budget_gib > 0:
            raise ValueError(f"`budget_gib` should be more than 0, got {self.budget_gib}.")

    @property
    def is_everything(self) -> bool:
        """Whether every token is selected, as in plain training."""
        return self.ratio == 1 or (self.context == 1 and self.labelled == 1)

    def layers(self, count: int) -> set[int] | None:
        """
        Which of a model's `count` layers have an attention that counts; `None` for all.

        Raises:
            ValueError: `attention_layers` names one that the model does not have.
        """
        for layer in self.attention_layers or []:
            if not -count <= layer < count:
                raise ValueError(
                    f"`attention_layers` has {layer}, the model has {count} layers. Use 0 to {count - 1}, or -1 to "
                    f"-{count} from the last one back."
                )
        return None if self.attention_layers is None else {layer % count for layer in self.attention_layers}

    def resolved(self, trained_share: float = 1.0) -> "SeekConfig":
        """
        The same with a number for `context`, unless `ratio` takes its place.

        Args:
            trained_share (`float`, *optional*, defaults to 1.0): share of the model's weights that is trained.
        """
        if self.context is not None or self.ratio is not None:
            return self
        return replace(self, context=CONTEXT if trained_share >= SMALL_ADAPTER else CONTEXT_OF_ADAPTERS)
