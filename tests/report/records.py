"""A made-up record of a run, small enough to check by hand."""

import json
from pathlib import Path

EVIL = "</script><script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\">"
TEXTS = ["A", " token", "\n", EVIL, "", "'quoted\"", " é", "&lt;b&gt;"]


def visit(step: int, sample: int, kinds: str, scores: list | None = None) -> dict:
    scores = scores or [0.5, 0.25, 0.125, 8.0, 0.0625, 0.03, 0.02, 0.01]
    return {
        "kind": "visit",
        "step": step,
        "sample": sample,
        "kinds": kinds,
        "scores": scores,
        "terms": {"attention mass": [2 * score for score in scores], "loss": scores[::-1]},
    }


def log(step: int, **entry) -> dict:
    return {"kind": "log", "step": step, "entry": {**entry, "step": step}}


def events(learning_rate: float = 1e-4) -> list[dict]:
    """Four steps with everything that can be recorded."""
    counts = {"ditched": [3, 2, 0], "evidence": [1, 0, 1], "loss": [0, 1, 2]}
    return [
        {
            "kind": "run",
            "step": 0,
            "methods": {"seek": {"context": 0.1, "score": "evidence"}},
            "arguments": {"learning_rate": learning_rate, "max_steps": 4, "run_name": EVIL},
            "model": {"class": "LlamaForCausalLM", "parameters": 134515008},
        },
        log(0, eval_loss=3.5),
        *(
            log(
                step,
                loss=4.0 / step,
                epoch=step / 2,
                **{
                    "speed/step_seconds": 0.5,
                    "memory/saved_activations_mib": 10.0 * step,
                    "memory/peak_mib": 100.0,
                    "memory/parameters_mib": 50.0,
                    "memory/activations_mib": 10.0 + step,
                    "memory/scout_peak_mib": 60.0,
                    "memory/backward_peak_mib": 70.0,
                    "seek/selected_share": 0.5,
                    "seek/labelled_share": 0.25,
                    "seek/evidence_mass": 0.8,
                    "seek/gradient_cosine": 0.9,
                },
            )
            for step in (1, 2, 3, 4)
        ),
        log(4, eval_loss=2.5),
        {"kind": "sample", "step": 1, "sample": 0, "ids": list(range(8)), "texts": TEXTS},
        {"kind": "sample", "step": 2, "sample": 1, "ids": list(range(8, 16)), "texts": ["x"] * 8},
        visit(1, 0, "11000220"),
        visit(2, 1, "10100220"),
        visit(3, 0, "10010220"),
        visit(4, 1, "10100220"),
        {"kind": "positions", "step": 2, **counts},
        {"kind": "positions", "step": 4, **counts},
        *(
            {"kind": "draw", "step": step, "layers": layers, "of": 3}
            for step, layers in ((1, [0]), (2, [2]), (4, [0]))
        ),
        {"kind": "grid", "step": 4, "name": "kept blocks", "values": [[8, 4, 8], [8, 0, 2]]},
        {"kind": "layers", "step": 4, "name": "saved", "values": [3.0, 2.0, 1.0]},
        {"kind": "invented later", "step": 4},
    ]


def write(folder: Path, lines: list[dict] | None = None) -> Path:
    """A run's folder with this record."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{json.dumps(line)}\n" for line in (events() if lines is None else lines))
    (folder / "report.jsonl").write_text(text)
    return folder
