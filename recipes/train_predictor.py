"""Trains LeMo's predictor for a model: the small network that says which blocks of a sequence matter.

The text is the source of the Python standard library, of which whole modules are held out, or a data set of records
as `recipes/sft.py` takes it. The model itself stays as it is. Options stand on the command line, in a file, or in both
(the command line wins):

    python recipes/train_predictor.py --output_dir outputs/predictor
    python recipes/train_predictor.py --model org/model --seq_length 4096 --dataset texts.jsonl --output_dir outputs/p
    python recipes/train_predictor.py --steps 8 --hidden 32 64 --prune_steps 0 --output_dir outputs/try
    python recipes/train_predictor.py --help

It prints, for each layer, which share of the blocks that the paper's score would keep are found on held-out text:
drawn blindly, by their place alone (where queries look back only, the first blocks have most of them), by
`score="pooled"`, which needs no training, and by the predictor before and after its training. The predictor, and these
figures in `train_predictor.json`, are saved into `output_dir`; train with
`LemoConfig(score="predictor", predictor=output_dir)`. A training that was interrupted goes on when the same command is
given again, and gives the same predictor.
"""

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

# started as a file, Python looks for modules beside it and not in the root of the checkout
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hf_tokenseek.lemo.predictor import WEIGHTS, Predictor, PredictorShape
from hf_tokenseek.lemo.predictor_training import Example
from hf_tokenseek.lemo.recording import recording
from hf_tokenseek.lemo.refusals import check_model
from hf_tokenseek.patching import find_causal_lm, find_layers
from recipes.checks import check_lengths
from recipes.command import prepared, read_options
from recipes.data import PadCollator, encode
from recipes.models import load_model
from recipes.predictor_arguments import PYTHON_SOURCE, PredictorArguments
from recipes.predictor_state import PredictorState, judge, table
from recipes.records import hold_out, load_records
from recipes.source_text import cut, source_files

CHECKPOINT, FIGURES = "train_predictor.pt", "train_predictor.json"

Sequences = list[dict[str, list[int]]]


@dataclass
class PredictorRun:
    """Everything that a training needs, checked.

    Args:
        arguments ([`PredictorArguments`]):
            The options.
        model (`PreTrainedModel`):
            The model to learn from.
        training, evaluation (`list`):
            Sequences of `input_ids` and `labels`.
        collate ([`PadCollator`]):
            Makes a batch of them.
    """

    arguments: PredictorArguments
    model: PreTrainedModel
    training: Sequences
    evaluation: Sequences
    collate: PadCollator

    def __call__(self) -> dict[str, Any]:
        """Train, judge, print, save. Returns the figures of [`~recipes.predictor_state.judge`]."""
        arguments, folder = self.arguments, Path(self.arguments.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        state = PredictorState(self._fresh(), arguments.steps, arguments.learning_rate)
        if (folder / CHECKPOINT).exists():
            state = state.gone_on(folder / CHECKPOINT)
        with recording(self.model):
            self._train(state, folder / CHECKPOINT)
            bar = tqdm(self.evaluation, "evaluation", disable=arguments.disable_tqdm)
            figures = judge(self._fresh(), state.predictor, [self._example([item]) for item in bar], arguments.keep)
        print(table(figures), flush=True)
        (folder / FIGURES).write_text(json.dumps({"options": asdict(arguments), **figures}, indent=1) + "\n")
        state.predictor.save(folder)
        # the last of all: as long as it is there, the training is not finished
        (folder / CHECKPOINT).unlink(missing_ok=True)
        return figures

    def _train(self, state: PredictorState, checkpoint: Path) -> None:
        arguments, pruning = self.arguments, self.arguments.pruning()
        order = random.Random(arguments.seed).sample(range(len(self.training)), len(self.training))
        bar = tqdm(total=arguments.steps, initial=state.step, desc="predictor", disable=arguments.disable_tqdm)
        with bar:
            while state.step < arguments.steps:
                first = state.step * arguments.batch_size
                drawn = [order[place % len(order)] for place in range(first, first + arguments.batch_size)]
                example = self._example([self.training[index] for index in drawn])
                loss = state.update(example, pruning.get(state.step + 1))
                bar.update()
                bar.set_postfix(loss=f"{loss:.4f}")
                if state.step % arguments.save_steps == 0 or state.step == arguments.steps:
                    state.save(checkpoint, arguments.identity())

    def _example(self, sequences: Sequences) -> Example:
        inputs = {name: values.to(self.model.device) for name, values in self.collate(sequences).items()}
        return Example(self.model, inputs, self.arguments.score())

    def _fresh(self) -> Predictor:
        """The predictor before its training, always the same."""
        arguments, model = self.arguments, find_causal_lm(self.model)
        torch.manual_seed(arguments.seed)
        layers, width = len(find_layers(model)[1]), model.config.get_text_config().hidden_size
        # a network for queries and one for keys
        hidden = [list(arguments.hidden)] * (2 * layers)
        shape = PredictorShape(
            layers, width, hidden, arguments.dim, arguments.block, arguments.queries, arguments.rope
        )
        return Predictor(shape).to(self.model.device)


def parse_arguments(argv: Sequence[str]) -> PredictorArguments:
    """The options of `--config FILE` and the command line; raises as [`~recipes.command.read_options`] does."""
    return read_options(argv, (PredictorArguments,), "recipes/train_predictor.py", __doc__)[0]


def check_folder(arguments: PredictorArguments) -> None:
    """Refuse a folder with a finished predictor, or with another one half trained.

    Raises:
        `FileExistsError`: names what is there and the next step.
    """
    folder, options = Path(arguments.output_dir), arguments.identity()
    if (folder / CHECKPOINT).exists():
        begun = torch.load(folder / CHECKPOINT, map_location="cpu", weights_only=True)["options"]
        changed = {name: begun.get(name) for name in options if begun.get(name) != options[name]}
        if changed:
            raise FileExistsError(
                f"output_dir={str(folder)!r} holds an interrupted training that was begun with {changed}. Give the "
                f"same options to go on, choose another --output_dir, or remove {CHECKPOINT}."
            )
    elif (folder / WEIGHTS).exists():
        raise FileExistsError(
            f"output_dir={str(folder)!r} already holds a predictor, which would be overwritten. Choose another "
            f"--output_dir, or remove {WEIGHTS}."
        )


def load_sequences(arguments: PredictorArguments, tokenizer: PreTrainedTokenizerBase) -> tuple[Sequences, Sequences]:
    """Tokenised text to train on, and other to evaluate on.

    Raises:
        `ValueError`: if there is too little, or as [`~recipes.records.load_records`] does.
    """
    length, wanted = arguments.seq_length, arguments.eval_sequences
    if arguments.dataset != PYTHON_SOURCE:
        parts = hold_out(load_records(arguments.dataset), wanted, arguments.seed)
        return tuple([encode(record, tokenizer, length) for record in part] for part in parts)
    training, held_out = (cut(list(source_files(split)), tokenizer, length) for split in ("train", "test"))
    if not training or len(held_out) < wanted:
        raise ValueError(
            f"There is too little text: {len(training)} sequences of seq_length={length} to train on, and "
            f"{len(held_out)} of eval_sequences={wanted} to evaluate on. Lower --seq_length or --eval_sequences."
        )
    return training, random.Random(0).sample(held_out, wanted)


def prepare(argv: Sequence[str]) -> PredictorRun:
    """Everything that comes before compute.

    Raises:
        `ValueError`, `OSError` or `ModuleNotFoundError`: names what is wrong, what is allowed and the next step.
    """
    arguments = parse_arguments(argv)
    arguments.score()
    check_folder(arguments)
    model, tokenizer = load_model(arguments.model)
    check_model(find_causal_lm(model))
    check_lengths(model, arguments.seq_length, "seq_length")
    sequences = load_sequences(arguments, tokenizer)
    model = model.requires_grad_(False).to("cuda" if torch.cuda.is_available() else "cpu")
    return PredictorRun(arguments, model, *sequences, PadCollator(tokenizer.pad_token_id))


if __name__ == "__main__":
    prepared(prepare)()
