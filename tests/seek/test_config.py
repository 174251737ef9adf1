import json
import re
from dataclasses import asdict, fields

import pytest
import torch

from hf_tokenseek.seek import SeekConfig
from hf_tokenseek.seek.batch import prepare
from hf_tokenseek.seek.config import CONTEXT_BIASES, GRADIENT_NORMS, MIXES, READ_BY, SCORES
from hf_tokenseek.seek.scores import SCORE_FUNCTIONS, Scouted
from tokenseek_kernels import HeadStatistics

# every field once, none of them without effect
WRITTEN = [
    {
        "context": 0.2,
        "labelled": 0.5,
        "evidence_queries": 7,
        "attention_layers": [1, -1],
        "plain_fallback": False,
        "probe_steps": 50,
    },
    {"ratio": "auto", "budget_gib": 7.5, "score": "hybrid", "alpha": 0.7, "beta": 0.0, "mix": "zscore"},
    {"score": "paper", "gradient_norm": "l1", "context_bias": "count", "temperature": 1.0, "seed": 3},
]


OTHER = {"alpha": 0.3, "beta": 0.3, "mix": "zscore", "gradient_norm": "signed", "context_bias": "harmonic"}


def scores_of(config):
    """The scores of five positions about which everything is known."""
    ids, generator = torch.zeros(1, 5, dtype=torch.long), torch.Generator().manual_seed(0)
    mass, norm = torch.rand(2, 1, 5, generator=generator)
    gradient = torch.randn(1, 5, 4, generator=generator)
    scouted = Scouted(mass, HeadStatistics(norm, norm, norm), gradient)
    return SCORE_FUNCTIONS[config.score].compute(scouted, prepare(config, ids, ids), config, generator)


def test_all_ways_of_writing_it_agree():
    assert set().union(*WRITTEN) == {field.name for field in fields(SeekConfig)}
    for values in WRITTEN:
        config = SeekConfig(**values)
        for written in (config, values, json.dumps(values), asdict(config)):
            assert SeekConfig.parse(written) == config
        # what a model card holds
        assert SeekConfig.parse(asdict(config.resolved())) == config.resolved()
    assert SeekConfig.parse({}) == SeekConfig.parse("{}") == SeekConfig()


@pytest.mark.parametrize("word", [True, "true", "True", " on ", "TRUE"])
def test_words_for_the_defaults(word):
    assert SeekConfig.parse(word) == SeekConfig()


@pytest.mark.parametrize("word", [None, False, "false", "None", "null", "off"])
def test_words_for_nothing(word):
    assert SeekConfig.parse(word) is None


@pytest.mark.parametrize("value", ["contxt=1", "0.3", "[1]", '"evidence"', "", 0.3, 1, ["evidence"]])
def test_other_kinds_are_refused(value):
    with pytest.raises(ValueError, match="`seek` should be .*JSON"):
        SeekConfig.parse(value)


def test_unknown_fields_are_named_beside_the_known():
    with pytest.raises(ValueError, match=r"unknown fields \['contxt'\].*'context'.*'labelled'"):
        SeekConfig.parse('{"contxt": 0.2}')


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("context", -0.1, "[0, 1]"),
        ("context", 1.1, "[0, 1]"),
        ("context", float("nan"), "[0, 1]"),
        ("context", "some", "a number"),
        ("context", "0.2", "a number"),
        ("labelled", 0.0, "(0, 1]"),
        ("labelled", None, "a number"),
        ("ratio", 0.0, "(0, 1]"),
        ("ratio", 10, "(0, 1]"),
        ("ratio", "all", "a number or 'auto'"),
        ("budget_gib", "24GiB", "a number"),
        ("evidence_queries", 12.5, "a whole number"),
        ("seed", None, "a whole number"),
        ("score", "evidnce", str(list(SCORES))),
        ("mix", "mean", str(list(MIXES))),
        ("gradient_norm", "l3", str(list(GRADIENT_NORMS))),
        ("context_bias", None, str(list(CONTEXT_BIASES))),
        ("evidence_queries", 0, "at least 1"),
        ("attention_layers", [], "a list of whole numbers"),
        ("attention_layers", [0.5], "a list of whole numbers"),
        ("attention_layers", 1, "a list of whole numbers"),
        ("temperature", -1.0, "0 (off) or positive"),
        ("temperature", float("nan"), "0 (off) or positive"),
        ("probe_steps", -1, "0 (off) or positive"),
    ],
)
def test_errors_say_name_value_and_allowed_set(name, value, allowed):
    with pytest.raises(ValueError, match=f"`{name}`.*{re.escape(allowed)}.*{re.escape(repr(value))}"):
        SeekConfig(**{name: value})


def test_bounds_are_allowed():
    for options in ({"context": 0.0}, {"context": 1}, {"labelled": 1e-6}, {"ratio": 1.0}, {"temperature": 0.0}):
        assert vars(SeekConfig(**options)).items() >= options.items()


def test_a_budget_is_one_of_the_automatic_ratio():
    assert SeekConfig(ratio="auto").budget_gib is None
    with pytest.raises(ValueError, match=r"`budget_gib` needs ratio='auto', got ratio=0.3"):
        SeekConfig(ratio=0.3, budget_gib=8)
    for value in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="`budget_gib` should be more than 0"):
            SeekConfig(ratio="auto", budget_gib=value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ratio": 0.1, "context": 0.5}, "ratio=0.1 is one budget.*context=0.5. Leave `context` out"),
        ({"ratio": 0.1, "labelled": 0.5}, "ratio=0.1 is one budget.*labelled=0.5. Leave `labelled` out"),
        ({"ratio": "auto", "context": 0.1}, "ratio='auto' is one budget.*context=0.1"),
        ({"alpha": 3.0}, r"alpha=3.0 has no effect with score='evidence'.*\['hybrid', 'paper'\]"),
        ({"beta": 0.5, "score": "context"}, "beta=0.5 has no effect with score='context'"),
        ({"mix": "zscore", "score": "paper"}, r"mix='zscore' has no effect with score='paper'.*\['hybrid'\]"),
        ({"gradient_norm": "l1", "score": "hybrid"}, "gradient_norm='l1' has no effect with score='hybrid'"),
        ({"context_bias": "count"}, "context_bias='count' has no effect with score='evidence'"),
        ({"attention_layers": [0], "score": "random"}, "attention_layers=.0. has no effect with score='random'"),
        ({"evidence_queries": 3, "score": "context"}, "evidence_queries=3 has no effect with score='context'"),
        ({"score": "loss"}, "score='loss' says nothing of .*context=0 .*ratio=.*'evidence'"),
        ({"score": "gradient", "context": 0.3, "labelled": 0.5}, "score='gradient' says nothing of"),
    ],
    ids=str,
)
def test_options_without_effect_are_refused_with_the_next_step(options, said):
    with pytest.raises(ValueError, match=said):
        SeekConfig(**options)


@pytest.mark.parametrize("budget", [{"ratio": 0.1}, {"ratio": "auto"}, {"context": 0}, {"context": 1.0}], ids=str)
@pytest.mark.parametrize("score", ["loss", "gradient"])
def test_scores_of_labels_where_no_evidence_is_to_be_chosen(score, budget):
    assert SeekConfig(score=score, **budget).resolved(0.01).context == budget.get("context")


@pytest.mark.parametrize(("option", "other"), OTHER.items())
@pytest.mark.parametrize("score", SCORES)
def test_a_score_reads_an_option_where_the_config_says_so(score, option, other):
    """Another value, set behind the config's back, makes other scores there and nowhere else."""
    config = SeekConfig(score=score, ratio=0.5)
    own = scores_of(config)
    setattr(config, option, other)
    assert torch.equal(own, scores_of(config)) == (score not in READ_BY[option])


def test_every_score_of_the_config_exists():
    assert tuple(SCORE_FUNCTIONS) == SCORES


def test_every_field_has_help():
    assert all(field.metadata.get("help") for field in fields(SeekConfig))


def test_context_depends_on_how_much_is_trained():
    assert SeekConfig().context is None
    assert SeekConfig().resolved().context == SeekConfig().resolved(0.1).context == 0.1
    assert SeekConfig().resolved(0.099).context == 0.25
    assert SeekConfig(context=0.1).resolved(0.01).context == 0.1
