"""Supervised fine-tuning with TokenSeek: back-propagate through the answers and what they look at only.

Options stand in the file, on the command line, or in both (the command line wins):

    python recipes/sft.py --config recipes/configs/demo_tokenseek.yaml
    python recipes/sft.py --config recipes/configs/sft_tokenseek.yaml --dataset my_records.jsonl --learning_rate 5e-5
    python recipes/sft.py --model smollm2 --dataset python-docstrings --output_dir outputs/plain --seek false
    python recipes/sft.py --config recipes/configs/sft_tokenseek.yaml --use_peft --seek '{"context": 0.2}'
    accelerate launch --config_file recipes/accelerate/fsdp2.yaml \\
        recipes/sft.py --config recipes/configs/sft_tokenseek.yaml
    python recipes/sft.py --help

It evaluates on held-out records before and after the training, and saves model, tokenizer, `trainer_state.json` and
`report.html` into `output_dir`, from where `AutoModelForCausalLM.from_pretrained` loads the model again.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

# started as a file, Python looks for modules beside it and not in the root of the checkout
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hf_tokenseek import TokenSeekArguments, TokenSeekTrainer
from hf_tokenseek.callbacks import ReportCallback
from recipes.checks import check_disk, check_lengths, check_records, check_strategy
from recipes.command import begin, read_options, run, start
from recipes.data import PadCollator, encode
from recipes.models import SMOLLM2, load_model
from recipes.records import PYTHON_DOCSTRINGS, hold_out, load_records

Encoded = list[dict[str, list[int]]]


@dataclass
class ModelArguments:
    """What to train.

    Args:
        model (`str`, *optional*, defaults to `"smollm2"`):
            Name or path of a causal language model, or `"smollm2"` (see [`~recipes.models.load_smollm2`]).
        use_peft (`bool`, *optional*, defaults to `False`):
            Train LoRA adapters instead of all weights; needs the package `peft`.
        load_in_4bit (`bool`, *optional*, defaults to `False`):
            With `use_peft`: keep the frozen weights in NF4 (QLoRA); needs the package `bitsandbytes`.
        lora_r (`int`, *optional*, defaults to 8):
            Rank of the adapters.
        lora_alpha (`int`, *optional*, defaults to 16):
            Scale of the adapters, divided by their rank.
        lora_dropout (`float`, *optional*, defaults to 0.0):
            Dropout at the adapters' input.
        lora_target_modules (`list[str]`, *optional*):
            Names of the layers that get an adapter; all linear layers but the head if not given.
    """

    model: str = field(default=SMOLLM2, metadata={"help": "Name or path of a causal model, or `smollm2`."})
    use_peft: bool = field(default=False, metadata={"help": "Train LoRA adapters instead of all weights."})
    load_in_4bit: bool = field(default=False, metadata={"help": "With use_peft: frozen weights in NF4 (QLoRA)."})
    lora_r: int = field(default=8, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale of the adapters, divided by their rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout at the adapters' input."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Layers that get an adapter; all linear ones but the head if not given."}
    )

    def __post_init__(self):
        if self.load_in_4bit and not self.use_peft:
            raise ValueError("`load_in_4bit` freezes the weights and needs adapters. Add --use_peft, or leave it out.")


@dataclass
class DataArguments:
    """What to train on.

    Args:
        dataset (`str`, *optional*, defaults to `"python-docstrings"`):
            The built-in task, a JSONL file, or what `datasets.load_dataset` takes; records of prompt and completion,
            or of messages.
        dataset_split (`str`, *optional*, defaults to `"train"`):
            Split to train on (unused with a JSONL file).
        eval_dataset (`str`, *optional*):
            Data set to evaluate on; if not given, the built-in task's own test split, or records held out of
            `dataset`.
        eval_split (`str`, *optional*, defaults to `"test"`):
            Split to evaluate on, where `eval_dataset` is given or the task is the built-in one.
        train_examples (`int`, *optional*):
            Train on the first so many records only.
        eval_examples (`int`, *optional*, defaults to 64):
            Evaluate on this many records.
        max_length (`int`, *optional*, defaults to 1024):
            Most tokens of a sequence; longer prompts lose their left end.
    """

    dataset: str = field(
        default=PYTHON_DOCSTRINGS, metadata={"help": f"`{PYTHON_DOCSTRINGS}`, a JSONL file, or a hub data set."}
    )
    dataset_split: str = field(default="train", metadata={"help": "Split to train on (unused with a JSONL file)."})
    eval_dataset: str | None = field(
        default=None, metadata={"help": "Data set to evaluate on; held out of `dataset` if not given."}
    )
    eval_split: str = field(default="test", metadata={"help": "Split to evaluate on."})
    train_examples: int | None = field(default=None, metadata={"help": "Train on the first so many records only."})
    eval_examples: int = field(default=64, metadata={"help": "Evaluate on this many records."})
    max_length: int = field(default=1024, metadata={"help": "Most tokens of a sequence."})


@dataclass
class TrainingRecipeArguments(TokenSeekArguments):
    """[`TokenSeekArguments`], and what the recipe itself decides.

    Args:
        report (`bool`, *optional*, defaults to `True`):
            Write `report.html` into `output_dir`, see [`~hf_tokenseek.callbacks.ReportCallback`].
    """

    report: bool = field(default=True, metadata={"help": "Write report.html into output_dir."})


def parse_arguments(argv: Sequence[str]) -> tuple[ModelArguments, DataArguments, TrainingRecipeArguments]:
    """The options of `--config FILE` and the command line; raises as [`~recipes.command.read_options`] does."""
    return read_options(argv, (ModelArguments, DataArguments, TrainingRecipeArguments), "recipes/sft.py", __doc__)


def load_data(arguments: DataArguments, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> tuple[Encoded, Encoded]:
    """Tokenised records to train on and to evaluate on."""
    training = load_records(arguments.dataset, arguments.dataset_split)
    held_out_source = arguments.eval_dataset or (PYTHON_DOCSTRINGS if arguments.dataset == PYTHON_DOCSTRINGS else None)
    if held_out_source is None:
        training, evaluation = hold_out(training, arguments.eval_examples, seed)
    else:
        evaluation = load_records(held_out_source, arguments.eval_split)[: arguments.eval_examples]
    return (
        [encode(record, tokenizer, arguments.max_length) for record in training[: arguments.train_examples]],
        [encode(record, tokenizer, arguments.max_length) for record in evaluation],
    )


def add_lora(model: PreTrainedModel, arguments: ModelArguments) -> PreTrainedModel:
    """Freeze `model` and give it LoRA adapters (imports `peft`)."""
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError:
        raise ModuleNotFoundError("`use_peft` needs the package `peft`. Run `pip install peft`.") from None
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=arguments.lora_target_modules or "all-linear",
    )
    return get_peft_model(model, config)


def prepare(argv: Sequence[str]) -> TokenSeekTrainer:
    """Everything that comes before compute: options, model, data, and whatever can be known to fail.

    Raises:
        `ValueError`, `OSError` or `ModuleNotFoundError`: names what is wrong, what is allowed and the next step.
    """
    model_arguments, data_arguments, training_arguments = parse_arguments(argv)
    begin(training_arguments)
    model, tokenizer = load_model(model_arguments.model, load_in_4bit=model_arguments.load_in_4bit)
    check_lengths(model, data_arguments.max_length)
    if model_arguments.use_peft:
        model = add_lora(model, model_arguments)
    check_disk(model, training_arguments)
    train_dataset, eval_dataset = load_data(data_arguments, tokenizer, training_arguments.seed)
    check_records(train_dataset, "training")
    check_records(eval_dataset, "evaluation")
    trainer = TokenSeekTrainer(
        model=model,
        args=training_arguments,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=PadCollator(tokenizer.pad_token_id),
        processing_class=tokenizer,
        callbacks=[ReportCallback()] if training_arguments.report else None,
    )
    check_strategy(trainer.accelerator)
    return trainer


def main(argv: Sequence[str]) -> dict[str, float]:
    """Prepare and run."""
    return run(prepare(argv))


if __name__ == "__main__":
    start(prepare)
