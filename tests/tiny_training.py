"""A training run of a few tiny steps, for the tests of trainers and callbacks."""

import torch
from transformers import TrainingArguments

from hf_tokenseek import TokenSeekArguments, TokenSeekTrainer

SELECTS = {"context": 0.2, "plain_fallback": False}
EVERYTHING = {"context": 1.0, "plain_fallback": False}


def examples(count: int = 24, answer: int = 5) -> list[dict[str, list[int]]]:
    """Sequences of 16 to 28 tokens, always the same, of which the last `answer` are labels."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for index in range(count):
        ids = torch.randint(1, 128, (16 + 4 * (index % 4),), generator=generator).tolist()
        found.append({"input_ids": ids, "labels": [-100] * (len(ids) - answer) + ids[-answer:]})
    return found


def pad(batch: list[dict]) -> dict[str, torch.Tensor]:
    """Pads on the right."""
    longest = max(len(row["input_ids"]) for row in batch)

    def column(rows, fill):
        return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows])

    return {
        "input_ids": column([row["input_ids"] for row in batch], 0),
        "attention_mask": column([[1] * len(row["input_ids"]) for row in batch], 0),
        "labels": column([row["labels"] for row in batch], -100),
    }


def arguments(folder, seek="plain", **options) -> TrainingArguments:
    """`TokenSeekArguments` with `seek`; plain `TrainingArguments` where it is not given."""
    values = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "remove_unused_columns": False,
        **options,
    }
    return TrainingArguments(**values) if isinstance(seek, str) else TokenSeekArguments(seek=seek, **values)


def trainer(model, args, kind=TokenSeekTrainer, **options):
    """A trainer of `kind` over [`examples`]."""
    rows = examples()
    return kind(model, args, train_dataset=rows, eval_dataset=rows[:4], data_collator=pad, **options)


def logs(trainer) -> list[dict]:
    """The training logs."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def losses(trainer) -> list[float]:
    """The logged training losses."""
    return [entry["loss"] for entry in logs(trainer)]


def weights(model) -> dict[str, torch.Tensor]:
    """A copy of all parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}
