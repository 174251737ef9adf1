"""What a user can choose about LeMo."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real

from ..method_config import MethodConfig

SCORES = ("pooled", "oracle", "predictor", "previous_layer", "random", "recency")
# those that read the tokens
LOOKING = ("pooled", "oracle", "predictor", "previous_layer")
QUERIES = ("labelled", "all", "later", "earlier")
MODES = ("elide", "detach")
MLPS = ("tokens", "dense", "neurons")
LOSSES = ("kept", "all")


@dataclass
class LemoConfig(MethodConfig):
    """
    Configuration of LeMo: which share of the tokens a layer computes, who they are, and what the others do.

    A sequence is cut into blocks of tokens. Layers run on the kept blocks and hand the others on as they are. Method:
    [LeMo](https://huggingface.co/papers/2501.09767), published as Jenga
    (USENIX ATC 2025).

    Args:
        keep (`float` or `list[float]`, *optional*, defaults to 0.4):
            Share of a sequence's blocks that a layer keeps, in (0, 1]; a list has one share a layer, as
            [`~lemo.calibrate`] finds them. 1 is plain training.
        block (`int`, *optional*, defaults to 64):
            Tokens in a block.
        score (`str`, *optional*, defaults to `"pooled"`):
            What makes a block worth keeping: `"pooled"` (how much the blocks' mean queries look at its mean key),
            `"oracle"` (the paper's score of all queries and keys, which costs a forward of the layer), `"predictor"`
            (a trained approximation of it, see `predictor`), `"previous_layer"` (the attention that it gets in the
            layer below the first one that drops tokens), `"random"` or `"recency"`.
        rescore (`int`, *optional*, defaults to 0):
            Every so many of the layers that drop tokens score anew, those between them go by the scores of the layer
            below; 0 scores once. 1 is as published: then a token misses some layers and comes back stale.
        queries (`str`, *optional*, defaults to `"labelled"`):
            Whose look at a block counts: `"labelled"` (of what causal attention lets see it, blocks that have labels;
            all where none has), `"later"` (all that causal attention lets see it), `"all"` (as published; what comes
            after a token has a say in how it is computed, which generation cannot repeat) or `"earlier"` (with
            `thresholds`, no later block has a say: blocks above their threshold are kept as they come until `bounds`
            are reached; only the length and the places of labels are known ahead. Without, as `"all"`).
        rope (`bool`, *optional*, defaults to `False`):
            Whether `"pooled"` and `"oracle"` know positions; the published score does not.
        dense_first (`int`, *optional*, defaults to 2):
            So many layers at the input run on all tokens.
        dense_last (`int`, *optional*, defaults to 0):
            So many layers at the output run on all tokens. As published it is 1; dropped tokens, which come there
            stale, are worse than none.
        sinks (`int`, *optional*, defaults to 1):
            Blocks at a sequence's begin that are always kept.
        recent (`int`, *optional*, defaults to 1):
            Blocks at its end that are always kept.
        labelled (`bool`, *optional*, defaults to `True`):
            Keep blocks with labels before others, as far as `keep` goes.
        thresholds (`list[float]`, *optional*):
            One for each layer: keep the blocks whose score is at least so many times the mean of their sequence,
            within `bounds`. [`~lemo.search_thresholds`] finds them.
        bounds (`list[float]`, *optional*, defaults to `[0.1, 0.6]`):
            With `thresholds`, the least and the largest share of blocks that is kept; memory follows from the latter.
        loss (`str`, *optional*, defaults to `"kept"`):
            `"kept"`: only tokens that every layer has computed are trained to predict, and stand for all labelled
            ones; `"all"`: as published, also tokens that have missed layers. No difference in `"detach"` mode.
        mode (`str`, *optional*, defaults to `"elide"`):
            `"elide"`: dropped tokens are not computed. `"detach"`: they are, without gradient; the loss stays exact.
        mlp (`str`, *optional*, defaults to `"tokens"`):
            `"tokens"`: dropped tokens skip the MLP, too; `"dense"`: it runs on all tokens; `"neurons"`: it does, and
            keeps the `neurons` largest columns for the backward pass (weights of the MLP have to be frozen).
        neurons (`float`, *optional*, defaults to 0.2):
            Share of the MLP's inner columns kept by `mlp="neurons"`.
        offload_gib (`float`, *optional*, defaults to 0.0):
            What a micro-batch's layers may move to the host's memory, in GiB, of what they keep for the backward pass;
            each has a part in proportion to that. Not with gradient checkpointing, whose
            `gradient_checkpointing_kwargs={"offload": True}` moves what it keeps. No effect on the CPU.
        predictor (`str`, *optional*):
            Folder of a trained predictor, see `recipes/train_predictor.py`.
        probe_steps (`int`, *optional*, defaults to 0):
            Every so many optimizer steps measure the share of the paper's score that the kept blocks have, and which
            share of the paper's choice they are; 0 never does. Costs one more forward.
        seed (`int`, *optional*, defaults to 0):
            Seed of all that is random.

    Raises:
        ValueError: a value lies outside its allowed set, or two do not fit together.
    """

    field_name, example = "lemo", '{"keep": 0.4}'

    keep: float | list[float] = field(default=0.4, metadata={"help": "Share of blocks a layer keeps, or one each."})
    block: int = field(default=64, metadata={"help": "Tokens in a block."})
    score: str = field(default="pooled", metadata={"help": f"What makes a block worth keeping: {', '.join(SCORES)}."})
    rescore: int = field(default=0, metadata={"help": "Score anew every so many layers that drop tokens; 0: once."})
    queries: str = field(default="labelled", metadata={"help": f"Whose look counts: {', '.join(QUERIES)}."})
    rope: bool = field(default=False, metadata={"help": "Whether scores know positions."})
    dense_first: int = field(default=2, metadata={"help": "Layers at the input that run on all tokens."})
    dense_last: int = field(default=0, metadata={"help": "Layers at the output that run on all tokens."})
    sinks: int = field(default=1, metadata={"help": "Blocks at the begin that are always kept."})
    recent: int = field(default=1, metadata={"help": "Blocks at the end that are always kept."})
    labelled: bool = field(default=True, metadata={"help": "Keep blocks with labels before others."})
    thresholds: list[float] | None = field(default=None, metadata={"help": "Least score of a kept block, per layer."})
    bounds: list[float] = field(
        default_factory=lambda: [0.1, 0.6], metadata={"help": "Least and largest share kept with thresholds."}
    )
    loss: str = field(default="kept", metadata={"help": f"Which labelled tokens count: {', '.join(LOSSES)}."})
    mode: str = field(default="elide", metadata={"help": f"What dropped tokens do: {', '.join(MODES)}."})
    mlp: str = field(default="tokens", metadata={"help": f"What the MLP runs on: {', '.join(MLPS)}."})
    neurons: float = field(default=0.2, metadata={"help": "Share of MLP columns kept by mlp='neurons'."})
    offload_gib: float = field(default=0.0, metadata={"help": "Host memory for what layers keep, in GiB."})
    predictor: str | None = field(default=None, metadata={"help": "Folder of a trained predictor."})
    probe_steps: int = field(default=0, metadata={"help": "Measure the choice every so many steps."})
    seed: int = field(default=0, metadata={"help": "Seed of all that is random."})

    def __post_init__(self):
        counts = ("block", "rescore", "dense_first", "dense_last", "sinks", "recent", "probe_steps", "seed")
        self._check_kind(Integral, "whole number", *counts)
        for name, least in (("block", 1), *((name, 0) for name in counts[1:-1])):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` should be at least {least}, got {getattr(self, name)}.")
        self._check_kind(Real, "number", "offload_gib")
        if not 0 <= self.offload_gib < float("inf"):
            raise ValueError(f"`offload_gib` should be at least 0 and finite, got {self.offload_gib!r}.")
        words = {"score": SCORES, "queries": QUERIES, "loss": LOSSES, "mode": MODES, "mlp": MLPS}
        for name, allowed in words.items():
            self._check_allowed(name, allowed)
        self._check_shares()
        self._check_thresholds()
        self._check_combinations()

    def shares(self, layers: int) -> list[float]:
        """
        The share of blocks that each of `layers` layers keeps, at most where thresholds decide.

        Raises:
            ValueError: `keep` or `thresholds` is a list for another number of layers, or no layer is left to drop.
        """
        for name in ("keep", "thresholds"):
            value = getattr(self, name)
            if isinstance(value, Sequence) and len(value) != layers:
                raise ValueError(
                    f"`{name}` has {len(value)} values, the model has {layers} layers. Give one for each, or a number."
                )
        if self.dense_first + self.dense_last >= layers:
            raise ValueError(
                f"dense_first={self.dense_first} and dense_last={self.dense_last} leave none of {layers} layers to "
                "drop tokens in. Lower them, or turn LeMo off."
            )
        most = self.keep if self.thresholds is None else self.bounds[1]
        own = list(most) if isinstance(most, Sequence) else [most] * layers
        return [
            share if self.dense_first <= layer < layers - self.dense_last else 1.0 for layer, share in enumerate(own)
        ]

    def _check_shares(self) -> None:
        for name in ("keep", "neurons"):
            value = getattr(self, name)
            for share in value if isinstance(value, Sequence) and not isinstance(value, str) else [value]:
                if not isinstance(share, Real) or isinstance(share, bool) or not 0 < share <= 1:
                    raise ValueError(f"`{name}` should be a share in (0, 1], got {value!r}.")

    def _check_thresholds(self) -> None:
        if not _are_numbers(self.bounds) or len(self.bounds) != 2 or not 0 < self.bounds[0] <= self.bounds[1] <= 1:
            raise ValueError(f"`bounds` should be two shares, 0 < least <= largest <= 1, got {self.bounds!r}.")
        if self.thresholds is not None and (not _are_numbers(self.thresholds) or min(self.thresholds, default=0) < 0):
            raise ValueError(f"`thresholds` should be a list of numbers of at least 0, got {self.thresholds!r}.")
        if self.thresholds is not None and self.bounds[1] == 1:
            raise ValueError(
                f"`thresholds` within bounds={self.bounds!r} would hold memory for all blocks, as without LeMo. Set "
                "the largest share below 1."
            )
        if self.thresholds is not None and isinstance(self.keep, Sequence):
            raise ValueError("A layer keeps blocks by `thresholds` or by a list in `keep`, got both. Leave one out.")

    def _check_combinations(self) -> None:
        if (self.score == "predictor") != (self.predictor is not None):
            raise ValueError(
                f"score={self.score!r} and predictor={self.predictor!r} do not fit together: score='predictor' needs "
                "the folder of a trained one (recipes/train_predictor.py), other scores take none."
            )
        if self.thresholds is not None and self.score in ("random", "recency"):
            raise ValueError(
                f"`thresholds` need a score that reads the tokens, got score={self.score!r}. Use one of {LOOKING}."
            )
        if self.score == "previous_layer" and (self.rescore or self.queries == "earlier" or not self.dense_first):
            raise ValueError(
                "score='previous_layer' is the attention that tokens get in the last layer that runs on all of them, "
                "from those that come later: it needs rescore=0, dense_first of at least 1 and no queries='earlier', "
                f"got rescore={self.rescore}, dense_first={self.dense_first}, queries={self.queries!r}. Change them, "
                "or set score='pooled'."
            )
        if self.mode == "detach" and self.mlp == "neurons":
            raise ValueError(
                "mode='detach' runs the MLP of kept tokens with gradient and of others without; mlp='neurons' has no "
                "meaning there. Use mlp='tokens' or mlp='dense'."
            )


def _are_numbers(values) -> bool:
    return isinstance(values, Sequence) and all(isinstance(value, Real) for value in values)
