import json
from pathlib import Path

import pytest

from recipes.sft import main
from tests.distributed.launching import IST, LEMO, STEPS, VELORA
from tests.tiny_folder import save_tiny_model


@pytest.fixture(scope="session")
def options(tmp_path_factory):
    """Builds the recipe's command line: three steps of eight records that differ in length and in labels."""
    folder = tmp_path_factory.mktemp("recipe")
    save_tiny_model(folder / "model")
    records = [
        {"prompt": f"Which number follows {n}? " * (2 + n % 5), "completion": f"It is {n + 1}." * (1 + n % 3)}
        for n in range(8 * STEPS + 4)
    ]
    (folder / "records.jsonl").write_text("\n".join(map(json.dumps, records)))

    def build(output: str, accumulation: int, *more: str) -> list[str]:
        return [
            *("--model", str(folder / "model"), "--dataset", str(folder / "records.jsonl"), "--max_length", "256"),
            *("--output_dir", str(folder / output), "--max_steps", str(STEPS), "--eval_examples", "4"),
            *("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", str(accumulation)),
            *("--per_device_eval_batch_size", "2", "--logging_steps", "1", "--report_to", "none"),
            *("--disable_tqdm", "true", "--use_cpu", "true", "--learning_rate", "1e-2", "--save_steps", "2"),
            *("--seek", '{"context": 0.2, "plain_fallback": false}', *more),
        ]

    build.folder = folder
    return build


@pytest.fixture(scope="session")
def one_process(options):
    """Folder of the run that every strategy has to equal: one process, the same global batch."""
    main(options("one_process", 4, "--save_strategy", "no"))
    return options.folder / "one_process"


@pytest.fixture(scope="session")
def one_method_process(options):
    """Folder of a run with VeLoRA, sparse tuning or LeMo that two ranks equal: its micro-batches are those of both."""

    def run(config: str) -> Path:
        if (folder := options.folder / f"one_{config}").exists():
            return folder
        own = {**VELORA, **IST, **LEMO}[config]
        main(options(folder.name, 2, "--per_device_train_batch_size", "4", "--save_strategy", "no", *own))
        return folder

    return run
