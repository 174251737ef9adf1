"""What the recipes share: options from a file and the command line, the way into a run and through it."""

import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments, set_seed
from transformers.utils import is_apollo_torch_available, is_galore_torch_available

from hf_tokenseek import TokenSeekTrainer
from recipes.checks import check_output, checkpoint_to_resume


class _HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """The description as it stands, the defaults behind each option."""


def read_options(
    argv: Sequence[str], kinds: Sequence[type], recipe: str, description: str, **defaults: Any
) -> tuple[Any, ...]:
    """Read `--config FILE` (YAML or JSON) and the command line; what stands on the command line wins.

    Args:
        argv (`Sequence[str]`):
            The command line.
        kinds (`Sequence[type]`):
            Dataclasses whose fields are the options.
        recipe (`str`):
            The script's path from the root of the checkout, as users type it.
        description (`str`):
            What `--help` says before the options.
        defaults (`Any`):
            The recipe's own defaults, by option.

    Returns:
        `tuple`: one instance of each of `kinds`.

    Raises:
        `FileNotFoundError`: if there is no such file.
        `ValueError`: if the file is no mapping or names an unknown option.
    """
    parser = HfArgumentParser(
        kinds,
        usage=f"python {recipe} [--config FILE] [--option VALUE ...]",
        description=description,
        formatter_class=_HelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file with any of these options.")
    parser.set_defaults(**defaults)
    config = parser.parse_known_args(argv)[0].config
    if config is not None:
        known = {action.dest for action in parser._actions} - {"help", "config"}
        parser.set_defaults(**_read_config(Path(config), known, recipe))
    *arguments, _ = parser.parse_args_into_dataclasses(list(argv))
    return tuple(arguments)


def _read_config(path: Path, known: set[str], recipe: str) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no configuration file {str(path)!r}.")
    options = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(options, dict):
        raise ValueError(f"The configuration file {str(path)!r} must hold `option: value` pairs.")
    unknown = sorted(options.keys() - known)
    if unknown:
        raise ValueError(f"{str(path)!r} has unknown options {unknown}. `python {recipe} --help` lists them.")
    return options


def begin(arguments: TrainingArguments) -> None:
    """Refuse to overwrite a run, find the checkpoint to go on from, seed; evaluation before training is switched on.

    Raises:
        `FileExistsError` or `FileNotFoundError`: see [`check_output`] and [`checkpoint_to_resume`].
    """
    check_output(arguments)
    arguments.resume_from_checkpoint = checkpoint_to_resume(arguments)
    if arguments.resume_from_checkpoint is not None:
        _admit_projectors(arguments.optim)
    arguments.eval_on_start = True
    set_seed(arguments.seed)


def _admit_projectors(optim: str) -> None:
    """Let `torch.load` take the projectors of GaLore and APOLLO, objects in their checkpoints."""
    if "galore" in optim and is_galore_torch_available():
        from galore_torch.galore_projector import GaLoreProjector

        torch.serialization.add_safe_globals([GaLoreProjector])
    elif "apollo" in optim and is_apollo_torch_available():
        from apollo_torch import random_projector, svd_projector

        torch.serialization.add_safe_globals([random_projector.GradientProjector, svd_projector.GaLoreProjector])


def run(trainer: TokenSeekTrainer) -> dict[str, float]:
    """Train, evaluate before and after, save. Returns the metrics of the last evaluation."""
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    metrics = trainer.evaluate()
    trainer.save_model()
    trainer.save_state()
    return metrics


def prepared(prepare: Callable[[Sequence[str]], Any]) -> Any:
    """What `prepare` makes of the process's command line; a mistake in it ends the process with one line."""
    try:
        return prepare(sys.argv[1:])
    except (ValueError, OSError, ModuleNotFoundError) as error:
        # a user's mistake needs its message, not our stack
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")


def start(prepare: Callable[[Sequence[str]], TokenSeekTrainer]) -> None:
    """Prepare and run what the process's command line says."""
    trainer = prepared(prepare)
    run(trainer)
    # a rank that exits with its process group open may be aborted by the group's threads
    trainer.accelerator.end_training()
