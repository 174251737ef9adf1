"""Pre-training of a small Llama from random weights: plainly, with VeLoRA, or with GaLore or APOLLO to compare.

The text is the source of the Python standard library; whole modules are held out. Every token is a label, so TokenSeek
is off. Options stand in the file, on the command line, or in both (the command line wins):

    python recipes/pretrain.py --config recipes/configs/pretrain_velora.yaml
    python recipes/pretrain.py --config recipes/configs/pretrain_velora.yaml --velora false --output_dir outputs/full
    python recipes/pretrain.py --config recipes/configs/pretrain_velora.yaml --velora '{"groups": 8}' --seed 1
    python recipes/pretrain.py --preset llama-60m --learning_rate 1e-3 --max_steps 1000 --output_dir outputs/60m
    python recipes/pretrain.py --optim galore_adamw --optim_target_modules '.*(attn|mlp).*' --optim_args rank=64 \\
        --learning_rate 1e-2 --max_steps 300 --output_dir outputs/galore
    python recipes/pretrain.py --help

(`apollo_adamw` takes the options of `galore_adamw`; the packages are galore-torch and apollo-torch.) It evaluates loss
and perplexity before and after the training, and saves model, tokenizer and `trainer_state.json` into `output_dir`;
`--resume_from_checkpoint true` goes on from the last checkpoint.
"""

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase, default_data_collator

# started as a file, Python looks for modules beside it and not in the root of the checkout
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hf_tokenseek import TokenSeekArguments, TokenSeekTrainer
from recipes.checks import check_disk, check_strategy
from recipes.command import begin, read_options, run, start
from recipes.small_llama import PRESETS, SHAPES, llama_shapes, random_llama
from recipes.source_text import cut, source_files, train_tokenizer

HELD_OUT = ("validation", "test")


@dataclass
class ModelArguments:
    """What to train.

    Args:
        preset (`str`, *optional*, defaults to `"llama-8m"`):
            Shapes of the model: `"llama-8m"` (hidden size 256, for a CPU) or `"llama-60m"` (the literature's, 512).
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads (`int`, *optional*):
            Each replaces the preset's.
    """

    preset: str = field(default="llama-8m", metadata={"help": f"Shapes of the model: {', '.join(PRESETS)}."})
    hidden_size: int | None = field(default=None, metadata={"help": "Width; the preset's if not given."})
    intermediate_size: int | None = field(default=None, metadata={"help": "Width of the MLPs; as above."})
    num_hidden_layers: int | None = field(default=None, metadata={"help": "Number of layers; as above."})
    num_attention_heads: int | None = field(default=None, metadata={"help": "Attention heads; as above."})


@dataclass
class TextArguments:
    """What to train on.

    Args:
        seq_length (`int`, *optional*, defaults to 256):
            Tokens of a sequence, and positions of the model.
        vocab_size (`int`, *optional*, defaults to 4096):
            Tokens of the vocabulary, which is trained on the training text.
        eval_split (`str`, *optional*, defaults to `"test"`):
            Modules to evaluate on: `"validation"` to choose by, `"test"` to report.
        eval_sequences (`int`, *optional*, defaults to 64):
            Evaluate on this many sequences, always the same.
    """

    seq_length: int = field(default=256, metadata={"help": "Tokens of a sequence."})
    vocab_size: int = field(default=4096, metadata={"help": "Tokens of the vocabulary."})
    eval_split: str = field(default="test", metadata={"help": f"Modules to evaluate on: {', '.join(HELD_OUT)}."})
    eval_sequences: int = field(default=64, metadata={"help": "Evaluate on this many sequences."})


class Text(NamedTuple):
    """Sequences of `input_ids` and `labels`, and what made them."""

    tokenizer: PreTrainedTokenizerBase
    training: list[dict[str, list[int]]]
    evaluation: list[dict[str, list[int]]]


class PretrainTrainer(TokenSeekTrainer):
    """[`TokenSeekTrainer`] that says the perplexity with each evaluation."""

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Adds `eval_perplexity` where there is an `eval_loss`."""
        if "eval_loss" in logs:
            # a diverged run gives infinity here, where `math.exp` raises
            logs["eval_perplexity"] = torch.tensor(logs["eval_loss"], dtype=torch.float64).exp().item()
        super().log(logs, *args, **kwargs)


def parse_arguments(argv: Sequence[str]) -> tuple[ModelArguments, TextArguments, TokenSeekArguments]:
    """The options of `--config FILE` and the command line; raises as [`~recipes.command.read_options`] does."""
    kinds = (ModelArguments, TextArguments, TokenSeekArguments)
    return read_options(argv, kinds, "recipes/pretrain.py", __doc__, seek="false")


def load_text(arguments: TextArguments) -> Text:
    """The standard library, cut into sequences; the tokenizer has seen the training text only.

    Raises:
        `ValueError`: if an option is outside its allowed set, or there is too little text.
    """
    length, wanted = arguments.seq_length, arguments.eval_sequences
    if arguments.eval_split not in HELD_OUT:
        raise ValueError(f"eval_split={arguments.eval_split!r} should be one of {', '.join(HELD_OUT)}.")
    if length < 2 or wanted < 1:
        raise ValueError(f"seq_length={length} should be at least 2, eval_sequences={wanted} at least 1.")
    files = list(source_files("train"))
    tokenizer = train_tokenizer(files, arguments.vocab_size)
    training = cut(files, tokenizer, length)
    held_out = cut(list(source_files(arguments.eval_split)), tokenizer, length)
    if not training or len(held_out) < wanted:
        raise ValueError(
            f"There is too little text: {len(training)} sequences of seq_length={length} to train on, and "
            f"{len(held_out)} of eval_sequences={wanted} to evaluate on. Lower --seq_length or --eval_sequences."
        )
    return Text(tokenizer, training, random.Random(0).sample(held_out, wanted))


def shapes_of(arguments: ModelArguments) -> dict[str, int]:
    """The model's shapes; raises as [`~recipes.small_llama.llama_shapes`] does."""
    return llama_shapes(arguments.preset, **{name: getattr(arguments, name) for name in SHAPES})


def build(shapes: dict[str, int], arguments: TokenSeekArguments, text: Text) -> PretrainTrainer:
    """The trainer of a fresh model.

    Raises:
        `ValueError` or `OSError`: see [`check_disk`] and [`check_strategy`].
    """
    model = random_llama(shapes, text.tokenizer, positions=len(text.training[0]["input_ids"]))
    check_disk(model, arguments)
    trainer = PretrainTrainer(
        model=model,
        args=arguments,
        train_dataset=text.training,
        eval_dataset=text.evaluation,
        data_collator=default_data_collator,
        processing_class=text.tokenizer,
    )
    check_strategy(trainer.accelerator)
    return trainer


def prepare(argv: Sequence[str]) -> PretrainTrainer:
    """Everything that comes before compute: options, text, model, and whatever can be known to fail.

    Raises:
        `ValueError` or `OSError`: names what is wrong, what is allowed and the next step.
    """
    model_arguments, text_arguments, training_arguments = parse_arguments(argv)
    begin(training_arguments)
    shapes = shapes_of(model_arguments)
    return build(shapes, training_arguments, load_text(text_arguments))


def main(argv: Sequence[str]) -> dict[str, float]:
    """Prepare and run."""
    return run(prepare(argv))


if __name__ == "__main__":
    start(prepare)
