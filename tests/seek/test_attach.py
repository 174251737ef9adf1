import inspect
import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, LlamaForSequenceClassification

from hf_tokenseek import SeekConfig, attach
from hf_tokenseek.lemo.attach import LemoHandle
from tests.seek.tiny_families import tiny_config, tiny_model

IDS = torch.randint(1, 128, (2, 20), generator=torch.Generator().manual_seed(0))
LABELS = IDS.masked_fill(torch.arange(20) < 15, -100)
BATCH = {"input_ids": IDS, "labels": LABELS}


def fingerprint(model):
    """Everything about the model that attaching could have touched."""
    return {
        "attributes": sorted(vars(model)),
        "forward": vars(model).get("forward"),
        "attention": [
            getattr(m.config, "_attn_implementation", None) for m in model.modules() if hasattr(m, "config")
        ],
        "config": model.config.to_dict(),
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "modes": [m.training for m in model.modules()],
        "signature": inspect.signature(model.forward),
    }


def outputs(model):
    """Loss and logits in evaluation, and loss and gradients in training."""
    model.eval()
    with torch.no_grad():
        evaluated = model(**BATCH)
    model.train()
    trained = model(**BATCH)
    gradients = torch.autograd.grad(trained.loss, list(model.parameters()))
    return [evaluated.loss, evaluated.logits, trained.loss.detach(), trained.logits.detach(), *gradients]


def assert_equal(left, right):
    for one, other in zip(left, right, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_undo_leaves_no_trace(tiny_llama, attention):
    model = tiny_llama()
    model.set_attn_implementation(attention)
    before, computed = fingerprint(model), outputs(model)
    with attach(model, seek=True) as handle:
        model(**BATCH).loss.backward()
        assert handle.selection is not None and model.training
    model.zero_grad(set_to_none=True)
    assert fingerprint(model) == before
    assert_equal(outputs(model), computed)
    handle.undo()  # a second time changes nothing
    assert fingerprint(model) == before


def test_a_forward_that_was_patched_before_is_given_back(tiny_llama):
    model, calls = tiny_llama(), []
    inner = model.forward

    def counting(*args, **kwargs):
        calls.append(1)
        return inner(*args, **kwargs)

    model.forward = counting
    with attach(model, seek=True):
        model.eval()(IDS)
        assert model.forward is not counting and calls == [1]
    assert model.forward is counting


def test_below_a_later_wrapper_undo_only_goes_silent(tiny_llama):
    """accelerate wraps `forward` of the instance after TokenSeek did."""
    model = tiny_llama()
    computed = outputs(model)
    handle = attach(model, seek=True)
    patched = model.forward
    model.forward = wrapper = lambda *args, **kwargs: patched(*args, **kwargs)
    handle.undo()
    assert model.forward is wrapper
    assert_equal(outputs(model), computed)


def test_evaluation_and_generation_see_the_original(tiny_llama):
    model = tiny_llama()
    plain, (loss, logits, *_) = tiny_llama().eval(), outputs(tiny_llama())
    with attach(model, seek=True) as handle:
        model.eval()
        with torch.no_grad():
            evaluated = model(**BATCH)
        assert torch.equal(evaluated.loss, loss) and torch.equal(evaluated.logits, logits)
        generated = model.generate(IDS, max_new_tokens=5, do_sample=False, use_cache=True)
        assert torch.equal(generated, plain.generate(IDS, max_new_tokens=5, do_sample=False, use_cache=True))
        # training mode without gradients is no training
        model.train()
        with torch.no_grad():
            assert torch.equal(model(**BATCH).logits, logits)
        # and gradients in evaluation mode are the plain ones
        assert torch.equal(model.eval()(**BATCH).loss, loss)
        assert handle.selection is None


def test_saved_while_attached_is_the_original(tiny_llama, tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "before")
    with attach(model, seek=True):
        model.save_pretrained(tmp_path / "attached")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("before", "attached")]
    assert configs[0] == configs[1]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "attached").eval()
    assert torch.equal(loaded(IDS).logits, model.eval()(IDS).logits)


def test_undo_and_resume(tiny_llama):
    model = tiny_llama()
    computed = outputs(model)
    with attach(model, seek=True) as handle:
        handle.seek.undo()
        assert_equal(outputs(model), computed)
        assert handle.selection is None
        handle.seek.resume()
        assert model(**BATCH).loss.requires_grad and handle.selection is not None


def test_the_signature_and_positional_arguments_stay(tiny_llama):
    model = tiny_llama()
    signature = inspect.signature(model.forward)
    with attach(model, seek=SeekConfig(context=0.5, plain_fallback=False)):
        assert inspect.signature(model.forward) == signature
        named = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=LABELS).loss
        positional = model(IDS, torch.ones_like(IDS), labels=LABELS).loss
        assert torch.equal(named, positional)


def test_whatever_goes_wrong_leaves_nothing_attached(tiny_llama, monkeypatch):
    def interrupted(self, *_):
        raise KeyboardInterrupt

    model = tiny_llama()
    before = fingerprint(model)
    monkeypatch.setattr(LemoHandle, "__init__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        attach(model, seek=True, lean=True, lemo=True)
    assert fingerprint(model) == before


def test_attaching_twice_is_refused_until_undone(tiny_llama):
    model = tiny_llama()
    with attach(model, seek=True):
        with pytest.raises(ValueError, match=r"attached to this model already.*undo\(\)"):
            attach(model, seek=True)
        assert model(**BATCH).loss.requires_grad
    with attach(model, seek=True) as handle:
        model(**BATCH)
        assert handle.selection is not None


@pytest.mark.parametrize("nothing", [None, False, "off"])
def test_nothing_to_attach_is_refused(tiny_llama, nothing):
    with pytest.raises(ValueError, match="no method.*seek=True, velora=True, ist=True, lemo=True or lean=True"):
        attach(tiny_llama(), seek=nothing)


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("gptj", "attention interface"),
        ("stablelm", "keywords"),
        ("mamba", "recurrent"),
        ("bert", "encoder"),
    ],
)
def test_unsupported_families_are_refused_with_the_reason(family, why):
    config = tiny_config(family)
    config.is_decoder = True
    model = AutoModelForCausalLM.from_config(config)
    before = fingerprint(model)
    with pytest.raises(ValueError, match=f"'{family}': .*{why}.*Supported: .*llama"):
        attach(model, seek=True)
    assert fingerprint(model) == before


def test_other_models_are_refused(tiny_llama):
    with pytest.raises(ValueError, match="transformers causal language model, got Linear"):
        attach(nn.Linear(2, 2), seek=True)
    with pytest.raises(ValueError, match="LlamaForSequenceClassification.*AutoModelForCausalLM"):
        attach(LlamaForSequenceClassification(tiny_llama().config), seek=True)


def test_the_routers_auxiliary_loss_is_refused():
    model = tiny_model("mixtral")
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match=r"output_router_logits.*auxiliary loss.*output_router_logits = False"):
        attach(model, seek=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, "needs `labels`.*label_smoothing_factor=0.*undo"),
        ({"token_type_ids": IDS}, r"\['token_type_ids'\].*input_ids.*labels"),
        ({"output_attentions": True}, r"\['output_attentions'\]"),
        ({"attention_mask": torch.ones(2, 1, 20, 20)}, "2-D attention mask"),
        ({"labels": LABELS[:, 1:]}, r"`labels` \(2, 19\).*\(2, 20\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_inputs_that_cannot_be_selected_are_refused(tiny_llama, change, message):
    model = tiny_llama()
    with attach(model, seek=True), pytest.raises(ValueError, match=message):
        model(**{**BATCH, **change})
    # the refusal leaves a model that works
    assert model(**BATCH).loss.requires_grad


def test_replacing_the_attention_after_attaching_is_refused(tiny_llama):
    model = tiny_llama()
    with attach(model, seek=True):
        model.set_attn_implementation("eager")
        with pytest.raises(ValueError, match="never called TokenSeek's attention.*before attach"):
            model(**BATCH)


def test_report_says_what_was_swapped_and_selected(tiny_llama):
    model = tiny_llama()
    with attach(model, seek=SeekConfig(context=0.2)) as handle:
        assert "sdpa -> tokenseek_sdpa in 3 layers" in handle.report()
        model(**BATCH)
        # 5 of 20 predict a label; a fifth of the other 15 is kept beside them
        assert "k/n = 8/20" in handle.report() and "25.0% of 40 real tokens" in handle.report()


def test_a_compiled_model_selects_too(tiny_llama):
    model = tiny_llama().train()
    with attach(model, seek=True) as handle:
        expected = model(**BATCH).loss
        rows, handle.seek.selection = handle.selection, None
        found = torch.compile(model, backend="eager")(**BATCH).loss
        assert torch.equal(handle.selection, rows)
        assert torch.equal(found, expected)


def test_a_model_in_evaluation_mode_is_no_secret(monkeypatch):
    """`from_pretrained` returns it so; TokenSeek acts in training."""
    said = []
    monkeypatch.setattr("hf_tokenseek.patched_forward.logger.warning_once", said.append)
    model = tiny_model("llama").eval()
    with attach(model, seek=True) as handle:
        with torch.no_grad():
            model(**BATCH)
        assert not said
        model(**BATCH).loss.backward()
        assert handle.selection is None
    assert len(said) == 1 and "computes plainly in evaluation mode" in said[0] and "Call model.train()" in said[0]


def test_a_budget_is_spent_on_labels_first():
    """Labels at the end of long prompts get little attention themselves."""
    model, labels = tiny_model("llama"), LABELS.masked_fill(torch.arange(20) < 17, -100)
    with attach(model, seek={"ratio": 0.25}) as handle:
        model(input_ids=IDS, labels=labels).loss.backward()
        rows = handle.selection.tolist()
        assert all({16, 17, 18} <= set(own) and len(own) == 5 for own in rows)
        assert handle.seek.metrics.read()["seek/kept_labels"] == 1
    with attach(model, seek={"ratio": 0.25, "score": "recent"}) as handle:
        model(input_ids=IDS, labels=LABELS.masked_fill(torch.arange(20) > 16, -100)).loss.backward()
        # the last five are 15 to 19; those that predict a label are 14 and 15
        assert handle.seek.metrics.read()["seek/kept_labels"] == 0.5


def test_a_loss_of_the_models_own_is_refused(tiny_llama):
    model = tiny_llama()
    model.loss_function = lambda logits, labels, **kwargs: logits.sum()
    with pytest.raises(ValueError, match="has loss_function=.*turn TokenSeek off"):
        attach(model, seek=True)

    class PenalisedForCausalLM(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.loss = output.loss + self.lm_head.weight.square().sum()
            return output

    with pytest.raises(ValueError, match="Penalised.* has a forward of its own .*Penalised.*.forward"):
        attach(PenalisedForCausalLM(tiny_llama().config).train(), seek=True)

    class RenamedForCausalLM(LlamaForCausalLM):
        pass

    with attach(RenamedForCausalLM(tiny_llama().config).train(), seek=True) as handle:
        assert handle.seek is not None


def test_scouting_leaves_out_what_nobody_reads():
    """The last MLP stands behind the last keys and values; a score at the head reads it."""
    calls = {}
    for score in ("evidence", "entropy"):
        model = tiny_model("llama")
        layers, calls[score] = model.model.layers, [0] * len(model.model.layers)
        for index, layer in enumerate(layers):

            def count(module, args, index=index, score=score):
                calls[score][index] += not torch.is_grad_enabled()

            layer.mlp.down_proj.register_forward_pre_hook(count)
        with attach(model, seek={"score": score, "context": 0.3, "plain_fallback": False}):
            model(**BATCH).loss.backward()
    assert calls["entropy"] == [1] * len(layers)
    assert calls["evidence"] == [*[1] * (len(layers) - 1), 0]


def test_metrics_are_those_of_all_methods(tiny_llama):
    """What a Trainer would log; reading them begins anew."""
    model = tiny_llama()
    methods = {"seek": {"context": 0.2}, "velora": {"groups": 4}, "ist": True, "lemo": {"block": 4, "dense_first": 0}}
    with attach(model, **methods, lean=True) as handle:
        handle.begin_step(0)
        model(**BATCH).loss.backward()
        found = handle.metrics(reset=False)
        assert {name.partition("/")[0] for name in found} == {"seek", "velora", "ist", "lemo"}
        assert found["seek/labelled_share"] == 0.25 and 0 < found["lemo/kept_share"] < 1
        assert handle.metrics().keys() == found.keys()
        assert not any(name.startswith(("seek/", "lemo/", "velora/")) for name in handle.metrics())
    assert attach(model, lean=True).metrics() == {}
