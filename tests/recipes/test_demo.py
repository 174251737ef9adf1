"""The demo's tables, curves and samples, on logs and models that cost nothing."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from recipes import demo

PLAIN = {"step_seconds": 4.0, "saved_activations_mib": 1000.4, "peak_device_mib": None, "peak_rss_mib": 3000.0}
TOKENSEEK = {"step_seconds": 1.5, "saved_activations_mib": 100.0, "peak_device_mib": None, "peak_rss_mib": 1500.0}
LOSSES = {"eval_loss_before": 3.0, "eval_loss_after": 2.0}


def log(*, memory=True):
    """Three steps between two evaluations."""
    steps = [
        {"step": step, "loss": 4.0 - step, "speed/step_seconds": seconds}
        | ({"memory/saved_activations_mib": 10.0 * step} if memory else {})
        for step, seconds in ((1, 9.0), (2, 1.0), (3, 3.0))
    ]
    return [{"step": 0, "eval_loss": 3.5}, *steps, {"step": 3, "eval_loss": 1.5}]


def test_a_run_in_figures():
    assert demo.summarise(log(), 512.0) == {
        # of the second and third step
        "step_seconds": 2.0,
        "saved_activations_mib": 30.0,
        "peak_device_mib": None,
        "peak_rss_mib": 512.0,
        "eval_loss_before": 3.5,
        "eval_loss_after": 1.5,
    }
    assert demo.summarise(log(memory=False), 512.0)["saved_activations_mib"] is None


def test_ratios_are_tokenseek_over_plain():
    lines = demo.table({"plain": {**PLAIN, **LOSSES}, "tokenseek": {**TOKENSEEK, **LOSSES}}).splitlines()
    assert lines[0] == "| | plain | tokenseek | ratio |"
    # what nothing has counted has no line, losses have no quotient
    assert lines[2:] == [
        "| step time, median [s] | 4.00 | 1.50 | 0.38 |",
        "| saved activations, largest step [MiB] | 1000 | 100 | 0.10 |",
        "| peak RSS, whole process [MiB] | 3000 | 1500 | 0.50 |",
        "| held-out loss before | 3.000 | 3.000 |  |",
        "| held-out loss after | 2.000 | 2.000 |  |",
    ]


def test_curves_show_loss_over_time_and_memory_over_steps(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    demo.draw({"plain": log(), "tokenseek": log(memory=False)}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    loss_axes, memory_axes = drawn[0].axes
    for line, method in zip(loss_axes.get_lines(), demo.METHODS, strict=True):
        assert line.get_label() == method
        assert line.get_xydata().tolist() == [[9.0, 3.0], [10.0, 2.0], [13.0, 1.0]]
    assert [line.get_xydata().tolist() for line in memory_axes.get_lines()] == [[[1, 10.0], [2, 20.0], [3, 30.0]], []]


@torch.no_grad()
def greedy(model, ids, tokenizer):
    """The likeliest token after the other, by plain forward passes."""
    answer = []
    while len(answer) < demo.SAMPLE_ANSWER_TOKENS and tokenizer.eos_token_id not in answer:
        answer.append(model(torch.tensor([ids + answer])).logits[0, -1].argmax().item())
    return " ".join(tokenizer.decode(answer, skip_special_tokens=True).split())


def test_samples_are_greedy_answers_of_every_model_to_short_prompts(tiny_model, tokenizer, tmp_path, monkeypatch):
    models = {"before": AutoModelForCausalLM.from_pretrained(tiny_model)}
    for seed, method in enumerate(demo.METHODS, 1):
        torch.manual_seed(seed)
        models[f"after {method}"] = LlamaForCausalLM(models["before"].config).eval()
        models[f"after {method}"].save_pretrained(tmp_path / method)
    prompts = ["First?", "Too long? " * demo.SAMPLE_PROMPT_TOKENS, "Second?", "Third?", "One too many?"]
    records = [{"prompt": prompt, "completion": f"To {prompt}", "module": prompt} for prompt in prompts]
    monkeypatch.setattr(demo, "OUTPUT", tmp_path)
    monkeypatch.setattr(demo, "load_smollm2", lambda: (models["before"], tokenizer))
    monkeypatch.setattr(demo, "python_docstrings", {"test": records}.__getitem__)
    expected = []
    for prompt in ("First?", "Second?", "Third?"):
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(asked, add_special_tokens=False)["input_ids"]
        answers = [f"- {name}: {greedy(model, ids, tokenizer)}" for name, model in models.items()]
        # three models, three answers
        assert len({answer.partition(": ")[2] for answer in answers}) == 3
        expected += [f"### A function of `{prompt}`", f"- true: To {prompt}", *answers]
    assert [line for line in demo.samples().split("\n") if line] == expected
