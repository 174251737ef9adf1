"""
The exactness matrix: every supported family against the plain model, and against it with the ditched rows detached.

Six families go through all combinations of padding, packing, batch, checkpointing and precision; the others through
five that have each of them. The tables of supported families (`hf_tokenseek/families.py`, `docs/families.md`) claim
what passes here.
"""

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from hf_tokenseek import SeekConfig, attach
from hf_tokenseek.families import MIXES_PACKED, POSITIONS_FROM_MASK, SUPPORTED
from hf_tokenseek.patching import evaluating
from hf_tokenseek.seek.attention import ScoutState
from hf_tokenseek.seek.batch import IGNORE, prepare
from hf_tokenseek.seek.passes import Decoder
from hf_tokenseek.seek.select import Selection
from scripts import write_families_doc
from tests.seek.naive import naive_loss
from tests.seek.tiny_families import REPRESENTATIVES, VOCABULARY, tiny_config, tiny_model

# older versions know no other name
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")

LENGTH, ROWS = 40, 14
# A sum of up to 256 products in another order differs by about sqrt(256) float32 roundings of 2^-24; some twenty such
# sums lie one after the other between an embedding and its gradient.
TOLERANCE = 20 * 16 * 2**-24
# bfloat16 has 8 significant bits.
HALF_ROUNDING = 2**-9


@dataclass(frozen=True)
class Scenario:
    layout: str = "full"
    batch: int = 2
    checkpointing: str | None = None
    dtype: torch.dtype = torch.float32

    def __str__(self):
        return f"{self.layout}-B{self.batch}-{self.checkpointing or 'kept'}-{str(self.dtype)[6:]}"


LAYOUTS, KINDS = ("full", "right", "left", "packed"), (None, "reentrant", "nonreentrant")
EVERY = [Scenario(*s) for s in itertools.product(LAYOUTS, (1, 3), KINDS, (torch.float32, torch.bfloat16))]
FEW = [
    Scenario(),
    Scenario("padded", 3, "nonreentrant"),
    Scenario("packed", 1),
    Scenario("packed", 1, "reentrant", torch.bfloat16),
    Scenario("left", 3, None, torch.bfloat16),
]


@dataclass
class Case:
    """A model, a batch, rows to keep, and what the plain model says about them."""

    inputs: dict
    labels: torch.Tensor
    real: torch.Tensor
    rows: torch.Tensor

    @property
    def keep(self) -> torch.Tensor:
        """`(batch, n)`: which positions `rows` names."""
        keep = torch.zeros(self.real.shape[0], self.real.shape[1] + 1, dtype=torch.bool)
        return keep.scatter_(1, self.rows.masked_fill(self.rows < 0, self.real.shape[1]), True)[:, :-1]

    @property
    def targets(self) -> torch.Tensor:
        """The next token's label, where it is real."""
        return F.pad(self.labels, (0, 1), value=IGNORE)[:, 1:].masked_fill(~self.real, IGNORE)


def make_case(scenario: Scenario) -> Case:
    torch.manual_seed(1)
    batch, n = scenario.batch, LENGTH
    input_ids = torch.randint(3, VOCABULARY, (batch, n))
    lengths = torch.tensor([n, n - 11, n - 7] if batch > 1 else [n - 11])[:batch]
    at, inputs = torch.arange(n).expand(batch, n), {"input_ids": input_ids}
    real = torch.ones(batch, n, dtype=torch.bool)
    if scenario.layout == "packed":
        limits = torch.tensor([17, 23, 9])[:batch, None]
        inputs["position_ids"] = torch.where(at < limits, at, at - limits)
    elif scenario.layout != "full":
        left = {"right": torch.zeros(batch, 1), "left": n - lengths[:, None], "padded": (n - lengths[:, None]) // 2}
        left = left[scenario.layout].long()
        real = (at >= left) & (at < left + lengths[:, None])
        inputs["attention_mask"] = real.long()
    # the answer is the last third of each sequence
    last = torch.where(real, at, 0).amax(1, keepdim=True)
    labels = input_ids.masked_fill((at <= last - n // 3) | ~real, IGNORE)
    order = torch.rand(batch, n).masked_fill(~real, -1).argsort(1, descending=True)[:, :ROWS]
    # the last sequence keeps fewer rows than the first: its slots are filled up by -1
    slots = torch.where(torch.arange(ROWS) < ROWS - torch.arange(batch)[:, None], order, n).sort(1).values
    return Case(inputs, labels, real, slots.masked_fill(slots == n, -1))


def build(family: str, scenario: Scenario):
    # in bfloat16 two right computations may send a token to different experts
    model = tiny_model(family, scenario.dtype, smooth=scenario.dtype == torch.bfloat16)
    if scenario.checkpointing and model.supports_gradient_checkpointing:
        # transformers itself loses gradients of keys and values shared by layers under reentrant checkpointing
        shared = getattr(model.config, "num_kv_shared_layers", 0)
        reentrant = scenario.checkpointing == "reentrant" and not shared
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {
        name: torch.zeros_like(p, dtype=torch.float32) if p.grad is None else p.grad.float().clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def largest_error(found: dict, truth: dict) -> float:
    """Largest difference relative to the largest gradient."""
    scale = max(g.abs().max() for g in truth.values())
    return float(max((found[name] - g).abs().max() for name, g in truth.items()) / scale)


def at_rows(states: torch.Tensor, case: Case) -> torch.Tensor:
    """The states of the selected rows, one after the other, without empty slots."""
    picked = states.gather(1, case.rows.clamp(min=0)[..., None].expand(-1, -1, states.shape[-1]))
    return picked[case.rows >= 0]


def head(decoder: Decoder, hidden: torch.Tensor) -> torch.Tensor:
    head = decoder.model.get_output_embeddings()
    weight, bias = head.weight, getattr(head, "bias", None)
    logits = F.linear(hidden, weight, bias).float() * decoder.head_rule["logit_scale"]
    cap = decoder.head_rule["softcap"]
    return cap * torch.tanh(logits / cap) if cap else logits


def plain_truth(model, case: Case, alone: bool):
    """
    Logits of all rows, and loss and gradients with the ditched rows detached, all from the plain model; packed
    documents each `alone` where the plain model mixes them.
    """
    parts = [(slice(None), slice(None))]
    if alone:
        starts = [row.tolist().index(0, 1) for row in case.inputs["position_ids"]]
        parts = [(slice(b, b + 1), at) for b, s in enumerate(starts) for at in (slice(0, s), slice(s, None))]
    targets = case.targets.masked_fill(~case.keep, IGNORE)
    logits, losses = torch.empty(*case.real.shape, VOCABULARY), []
    for part in parts:
        inputs = {name: value[part] for name, value in case.inputs.items()}
        model.eval()
        with torch.no_grad():
            logits[part] = model(**inputs, use_cache=False).logits.float()
        model.train()
        losses.append(naive_loss(model, inputs, targets[part], case.keep[part]))
    loss = sum(losses)
    return logits, loss.detach(), gradients(model, loss)


def engine(model, family: str, case: Case):
    """The same from TokenSeek's own passes: logits of scouting, logits of ditching, loss, gradients."""
    config = SeekConfig(plain_fallback=False)
    with attach(model, seek=config) as handle:
        decoder = handle.seek.decoder
        mask, positions = (case.inputs.get(name) for name in ("attention_mask", "position_ids"))
        tokens, counted = case.inputs["input_ids"], family in POSITIONS_FROM_MASK
        batch = prepare(config, tokens, case.labels, mask, positions, positions_from_mask=counted)
        assert torch.equal(batch.targets, case.targets)
        state = ScoutState(batch.visibility)
        with torch.no_grad(), evaluating(model):
            scouted = head(decoder, decoder._run(batch.tokens, batch.positions, state))
        targets = batch.targets.gather(1, case.rows.clamp(min=0)).masked_fill(case.rows < 0, IGNORE)
        hidden = decoder.ditch(batch, state, Selection(case.rows, targets, torch.ones(case.rows.shape)))
        losses, _ = decoder.losses(hidden, targets, int((targets != IGNORE).sum()))
        grads = gradients(model, losses.sum())
        with torch.no_grad():
            ditched = head(decoder, hidden.detach())[case.rows >= 0]
    return scouted, ditched, losses.sum().detach(), grads


def compare(found, truth, case: Case) -> dict[str, float]:
    """Largest errors, relative to the largest value of their kind."""
    (scouted, ditched, loss, grads), (logits, true_loss, true_grads) = found, truth
    scale = logits[case.real].abs().max()
    return {
        "scout": float((scouted - logits)[case.real].abs().max() / scale),
        "ditch": float((ditched - at_rows(logits, case)).abs().max() / scale),
        "loss": float((loss - true_loss).abs() / true_loss),
        "gradient": largest_error(grads, true_grads),
    }


def check_passes(family: str, scenario: Scenario):
    case = make_case(scenario)
    alone = scenario.layout == "packed" and family in MIXES_PACKED
    plain = build(family, replace(scenario, checkpointing=None))
    found = engine(build(family, scenario), family, case)
    if scenario.dtype == torch.float32:
        errors = compare(found, plain_truth(plain, case, alone), case)
        allowed = dict.fromkeys(errors, TOLERANCE)
    else:
        # the truth is float32 with the weights that bfloat16 has; the plain model in bfloat16 sets the measure
        logits, loss, grads = plain_truth(plain, case, alone)
        truth = plain_truth(plain.float(), case, alone)
        errors = compare(found, truth, case)
        measure = compare((logits, at_rows(logits, case), loss, grads), truth, case)
        allowed = {name: 2 * error + HALF_ROUNDING for name, error in measure.items()}
    assert all(errors[name] <= allowed[name] for name in errors), f"errors {errors}, allowed {allowed}"


@pytest.mark.parametrize("scenario", EVERY, ids=str)
@pytest.mark.parametrize("family", REPRESENTATIVES)
def test_passes_equal_plain_model_in_every_scenario(family, scenario):
    """Identities 1 and 2."""
    check_passes(family, scenario)


@pytest.mark.parametrize("scenario", FEW, ids=str)
@pytest.mark.parametrize("family", [f for f in SUPPORTED if f not in REPRESENTATIVES])
def test_passes_equal_plain_model(family, scenario):
    """Identities 1 and 2."""
    check_passes(family, scenario)


@pytest.mark.parametrize("budget", [{"ratio": 1.0}, {"context": 1.0}], ids=["ratio", "context"])
@pytest.mark.parametrize("family", SUPPORTED)
def test_everything_selected_equals_plain_training(family, budget):
    """Identity 3."""
    scenario = Scenario("right", 3)
    case, model = make_case(scenario), build(family, scenario)
    plain = model(**case.inputs, labels=case.labels).loss
    truth = gradients(model, plain)
    with attach(model, seek=SeekConfig(plain_fallback=False, **budget)) as handle:
        loss = model(**case.inputs, labels=case.labels).loss
        grads = gradients(model, loss)
    assert (handle.selection >= 0).sum() == case.real.sum()
    assert float((loss - plain).detach().abs() / plain.detach()) <= TOLERANCE
    assert largest_error(grads, truth) <= TOLERANCE


@pytest.mark.parametrize(
    "family, rope",
    [
        ("llama", {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}),
        (
            "phi3",
            {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 8,
                "long_factor": [3.0] * 8,
                "original_max_position_embeddings": 24,
            },
        ),
    ],
)
def test_rotary_frequencies_follow_the_whole_sequence(family, rope):
    """Dynamic frequencies depend on the largest position, which the selected rows need not hold."""
    config = tiny_config(family)
    config.rope_parameters, config.max_position_embeddings = rope, 24
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).train()
    case = make_case(Scenario())
    case.rows = torch.arange(4, 4 + ROWS).expand(2, -1)
    truth = plain_truth(model, case, alone=False)
    scouted, ditched, _, _ = engine(model, family, case)
    scale = truth[0].abs().max()
    assert float((scouted - truth[0]).abs().max() / scale) <= TOLERANCE
    assert float((ditched - at_rows(truth[0], case)).abs().max() / scale) <= TOLERANCE


def test_document_says_what_is_verified_here():
    """After a change of hf_tokenseek/families.py: `PYTHONPATH=kernels:. python scripts/write_families_doc.py`."""
    assert write_families_doc.PATH.read_text() == write_families_doc.document()
