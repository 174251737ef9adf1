"""Fine-tune one model plainly and with TokenSeek on the same data and seed, and compare the two runs.

    python -m recipes.demo [any option of recipes.sft, given to both runs, e.g. --max_steps 50]

Writes `outputs/demo/`: the two models, `report.html` (both runs side by side), `report.md` and `report.json` (the
table), `curves.png`, `samples.md`.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.utils import logging

from hf_tokenseek.report.page import PAGE, write_page
from recipes.data import encode, prompt_ids
from recipes.models import load_smollm2
from recipes.python_docstrings import python_docstrings

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "outputs" / "demo"
METHODS = ("plain", "tokenseek")
SAMPLES, SAMPLE_PROMPT_TOKENS, SAMPLE_ANSWER_TOKENS = 3, 300, 32

# row name -> key of the summary; the unit stands in the name
ROWS = {
    "step time, median [s]": "step_seconds",
    "saved activations, largest step [MiB]": "saved_activations_mib",
    "peak device memory [MiB]": "peak_device_mib",
    "peak RSS, whole process [MiB]": "peak_rss_mib",
    "held-out loss before": "eval_loss_before",
    "held-out loss after": "eval_loss_after",
}


def train(method: str, options: Sequence[str]) -> float:
    """Run the recipe in a process of its own, so that its peak memory is its own; returns the peak RSS in MiB."""
    config = ROOT / "recipes" / "configs" / f"demo_{method}.yaml"
    # the recipe overwrites nothing; what an earlier demo has left is the demo's own
    shutil.rmtree(OUTPUT / method, ignore_errors=True)
    command = [sys.executable, "-m", "recipes.sft", "--config", str(config), *options]
    process = subprocess.Popen([*command, "--output_dir", str(OUTPUT / method)], cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"The {method} run failed with status {os.waitstatus_to_exitcode(status)}; see above.")
    # Linux counts in KiB, macOS in bytes
    return usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def read_log(method: str) -> list[dict[str, float]]:
    """The Trainer's log of a finished run, one entry a step or an evaluation."""
    return json.loads((OUTPUT / method / "trainer_state.json").read_text())["log_history"]


def column(log: list[dict[str, float]], key: str) -> list[float]:
    """All values that were logged under `key`, in the order of the steps."""
    return [entry[key] for entry in log if key in entry]


def summarise(log: list[dict[str, float]], peak_rss_mib: float) -> dict[str, float | None]:
    """The figures of one run; `None` where nothing counted them."""
    eval_losses = column(log, "eval_loss")
    return {
        # the first step also allocates the optimizer's state
        "step_seconds": statistics.median(column(log, "speed/step_seconds")[1:]),
        "saved_activations_mib": max(column(log, "memory/saved_activations_mib"), default=None),
        "peak_device_mib": max(column(log, "memory/peak_mib"), default=None),
        "peak_rss_mib": peak_rss_mib,
        "eval_loss_before": eval_losses[0],
        "eval_loss_after": eval_losses[-1],
    }


def table(summaries: dict[str, dict[str, float | None]]) -> str:
    """A markdown table of the two runs and TokenSeek's figure as a share of plain training's."""
    lines = [f"| | {' | '.join(METHODS)} | ratio |", "| --- | ---: | ---: | ---: |"]
    for name, key in ROWS.items():
        plain, tokenseek = (summaries[method][key] for method in METHODS)
        if plain is None or tokenseek is None:
            continue
        digits = 0 if name.endswith("[MiB]") else 2 if name.endswith("[s]") else 3
        # the quotient of two losses says nothing
        ratio = "" if "loss" in name else f"{tokenseek / plain:.2f}"
        lines.append(f"| {name} | {plain:.{digits}f} | {tokenseek:.{digits}f} | {ratio} |")
    return "\n".join(lines)


def draw(logs: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Training loss over wall time, and saved activations over steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (loss_axes, memory_axes) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for method, log in logs.items():
        steps = [entry for entry in log if "loss" in entry]
        seconds = torch.tensor(column(steps, "speed/step_seconds")).cumsum(0)
        loss_axes.plot(seconds, column(steps, "loss"), label=method)
        saved = [entry for entry in steps if "memory/saved_activations_mib" in entry]
        memory_axes.plot(column(saved, "step"), column(saved, "memory/saved_activations_mib"), label=method)
    loss_axes.set(xlabel="seconds of training", ylabel="training loss", title="Loss")
    memory_axes.set(xlabel="step", ylabel="MiB", title="Saved activations", ylim=(0, None))
    for axes in (loss_axes, memory_axes):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


@torch.no_grad()
def samples() -> str:
    """Docstrings for a few held-out functions, written by the model before and after each run (greedy decoding)."""
    base, tokenizer = load_smollm2()
    models = {"before": base}
    for method in METHODS:
        models[f"after {method}"] = AutoModelForCausalLM.from_pretrained(OUTPUT / method, dtype=torch.float32)
    text = []
    for record, prompt in _short_prompts(tokenizer):
        ids = torch.tensor([prompt])
        text += [f"### A function of `{record['module']}`\n", f"- true: {record['completion']}"]
        for name, model in models.items():
            answer = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=SAMPLE_ANSWER_TOKENS,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )[0, len(prompt) :]
            text.append(f"- {name}: {' '.join(tokenizer.decode(answer, skip_special_tokens=True).split())}")
        text.append("")
    return "\n".join(text)


def _short_prompts(tokenizer: PreTrainedTokenizerBase) -> list[tuple[dict[str, str], list[int]]]:
    """The first few held-out records that are quick to answer, with their prompts' tokens."""
    records = python_docstrings("test")
    prompts = ((record, prompt_ids(encode(record, tokenizer, max_length=8192))) for record in records)
    return list(islice((pair for pair in prompts if len(pair[1]) <= SAMPLE_PROMPT_TOKENS), SAMPLES))


def main(options: Sequence[str]) -> None:
    logging.disable_progress_bar()
    OUTPUT.mkdir(parents=True, exist_ok=True)
    # unpacked here, so that it counts for neither run
    load_smollm2()
    summaries, logs = {}, {}
    for method in METHODS:
        print(f"\n== {method}: same model, data and seed ==", flush=True)
        peak_rss_mib = train(method, options)
        logs[method] = read_log(method)
        summaries[method] = summarise(logs[method], peak_rss_mib)
    report = table(summaries)
    (OUTPUT / "report.md").write_text(report + "\n")
    (OUTPUT / "report.json").write_text(json.dumps(summaries, indent=2) + "\n")
    draw(logs, OUTPUT / "curves.png")
    write_page([OUTPUT / method for method in METHODS], OUTPUT / PAGE)
    print(f"\n{report}\n", flush=True)
    examples = samples()
    (OUTPUT / "samples.md").write_text(examples + "\n")
    print(
        f"{examples}\nWritten to {OUTPUT.relative_to(ROOT)}/: {PAGE} (open it in a browser), report.md, report.json, "
        "curves.png, samples.md, models."
    )


if __name__ == "__main__":
    main(sys.argv[1:])
