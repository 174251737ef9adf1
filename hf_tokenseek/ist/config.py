"""What a user can choose about sparse tuning."""

from dataclasses import dataclass, field
from numbers import Integral, Real

from ..method_config import MethodConfig

POLICIES = ("ist", "top", "lisa", "random", "round_robin", "gradient_norm")
# those that learn which layers matter by suppressing them
LEARNED = ("ist", "top")
STATES = ("free", "keep", "offload")
REWARDS = ("standardised", "exp")
# sizes of an update: of a standardised advantage, and the released code's for exp(-loss)
RATES = {"standardised": 0.15, "exp": 10.0}


@dataclass
class IstConfig(MethodConfig):
    """
    Configuration of layer-sparse tuning: how many layers train at a time, which, and what the others cost.

    The layers of a period are active; the others are computed but take no gradient and save no inputs of their own
    weights, and below the lowest active layer nothing is saved at all where nothing else is trained there. Methods:
    [IST](https://huggingface.co/papers/2410.11772) (its released code; the score's sign here is that of its name),
    [LISA](https://huggingface.co/papers/2403.17919).

    Args:
        layers (`float`, *optional*, defaults to 0.25):
            Share of the decoder layers that trains at a time, in (0, 1]; at least one layer. 1 is plain training.
        policy (`str`, *optional*, defaults to `"ist"`):
            Who trains: `"ist"` (drawn, the more important the likelier; importance is learned by suppressing layers),
            `"top"` (the most important ones), `"lisa"` (drawn evenly, for layers whose own weights are trained),
            `"random"` (drawn evenly, for adapters too), `"round_robin"`, or `"gradient_norm"` (drawn by the norm of a
            layer's last gradients).
        period (`int`, *optional*, defaults to 20):
            Optimizer steps between two draws. The released IST draws in each step (1), LISA every 20.
        lowest (`float`, *optional*, defaults to 0.0):
            Share of the layers, counted from the input, that never trains. The peak of a run is that of its lowest
            layer: 1 - `layers` trains the topmost layers only.
        embeddings (`bool`, *optional*, defaults to `True`):
            Whether what lies outside of the layers (embeddings, head, last norm) trains as it did; `False` freezes it.
        state (`str`, *optional*, defaults to `"free"`):
            Optimizer state of a layer that stops training: `"free"` (dropped; it starts afresh the next time),
            `"keep"`, or `"offload"` (kept in the CPU's memory).
        unbiased (`bool`, *optional*, defaults to `False`):
            Divide a layer's gradient by its probability of being drawn, so that the expected gradient is the full one.
        score_steps (`int`, *optional*, defaults to 40):
            For `"ist"` and `"top"`: every so many optimizer steps, measure the loss of the coming micro-batch, which
            has not been trained on, with layers suppressed.
        candidates (`int`, *optional*, defaults to 4):
            Sets of layers that are suppressed, one forward each.
        suppressed (`float`, *optional*, defaults to 0.5):
            Share of the layers in a set.
        antithetic (`bool`, *optional*, defaults to `False`):
            Draw sets in pairs, the second the complement of the first.
        beta (`float`, *optional*, defaults to 0.25):
            What is left of a suppressed layer's response: of its adapters', or of the layer's without adapters.
        reward (`str`, *optional*, defaults to `"standardised"`):
            `"standardised"`: how far a set's loss lies below the mean, in units of the losses' running spread;
            `"exp"`: the released code's exp(-loss), whose steps shrink where losses are large.
        rate (`float`, *optional*):
            Size of an update of the importance; defaults to 0.15 for `"standardised"`, 10 for `"exp"`.
        seed (`int`, *optional*, defaults to 0):
            Seed of all draws.

    Raises:
        ValueError: a value lies outside its allowed set, or two do not fit together.
    """

    field_name, example = "ist", '{"layers": 0.25}'

    layers: float = field(default=0.25, metadata={"help": "Share of the layers that trains at a time."})
    policy: str = field(default="ist", metadata={"help": f"Who trains: {', '.join(POLICIES)}."})
    period: int = field(default=20, metadata={"help": "Optimizer steps between two draws."})
    lowest: float = field(default=0.0, metadata={"help": "Share of the layers, from the input, that never trains."})
    embeddings: bool = field(default=True, metadata={"help": "Train what lies outside of the layers."})
    state: str = field(default="free", metadata={"help": f"State of idle layers: {', '.join(STATES)}."})
    unbiased: bool = field(default=False, metadata={"help": "Divide gradients by the probability of the draw."})
    score_steps: int = field(default=40, metadata={"help": "Measure importance every so many steps."})
    candidates: int = field(default=4, metadata={"help": "Sets of layers to suppress, one forward each."})
    suppressed: float = field(default=0.5, metadata={"help": "Share of the layers in a set."})
    antithetic: bool = field(default=False, metadata={"help": "Draw sets in pairs of complements."})
    beta: float = field(default=0.25, metadata={"help": "What is left of a suppressed layer's response."})
    reward: str = field(default="standardised", metadata={"help": f"Of a set: {', '.join(REWARDS)}."})
    rate: float | None = field(default=None, metadata={"help": "Size of an update of the importance."})
    seed: int = field(default=0, metadata={"help": "Seed of all draws."})

    def __post_init__(self):
        self._check_kind(Integral, "whole number", "period", "score_steps", "candidates", "seed")
        self._check_kind(Real, "number", "layers", "lowest", "suppressed", "beta", "rate")
        self._check_allowed("policy", POLICIES)
        self._check_allowed("state", STATES)
        self._check_allowed("reward", REWARDS)
        if self.rate is None:
            self.rate = RATES[self.reward]
        for name, lowest in (("period", 1), ("score_steps", 1), ("candidates", 2)):
            if getattr(self, name) < lowest:
                raise ValueError(f"`{name}` should be at least {lowest}, got {getattr(self, name)}.")
        self._check_shares()
        self._check_combinations()

    def _check_shares(self) -> None:
        if not 0 < self.layers <= 1:
            raise ValueError(f"`layers` should be a share in (0, 1], got {self.layers}.")
        if not 0 < self.suppressed < 1:
            raise ValueError(f"`suppressed` should be a share in (0, 1), got {self.suppressed}.")
        if not 0 <= self.beta < 1:
            raise ValueError(f"`beta` should be in [0, 1), got {self.beta}: 1 suppresses nothing.")
        if not 0 <= self.lowest <= 1 - self.layers + 1e-9:
            raise ValueError(
                f"`lowest` should be in [0, 1 - layers] = [0, {1 - self.layers:g}], got {self.lowest}: there would be "
                f"fewer than `layers`={self.layers} left to train."
            )
        if self.rate <= 0:
            raise ValueError(f"`rate` should be above 0, got {self.rate}.")

    def _check_combinations(self) -> None:
        if self.antithetic and (self.candidates % 2 or self.suppressed != 0.5):
            raise ValueError(
                "antithetic=True needs an even number of `candidates` and suppressed=0.5, got "
                f"{self.candidates} and {self.suppressed}: complements would suppress another number of layers."
            )
        if self.unbiased and self.policy in ("top", "round_robin"):
            raise ValueError(
                f"unbiased=True needs layers that are drawn, got policy={self.policy!r}, which chooses them. Use "
                "'ist', 'lisa', 'random' or 'gradient_norm'."
            )
