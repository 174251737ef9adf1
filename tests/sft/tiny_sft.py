"""Tiny fine-tuning runs with trl: a tokenizer of words, data sets of every kind, a trainer, its logs."""

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from hf_tokenseek import TokenSeekSFTConfig, TokenSeekSFTTrainer

SELECTS = {"context": 0.1, "plain_fallback": False}
EVERYTHING = {"context": 1.0, "plain_fallback": False}
RATIO_ONE = {"ratio": 1.0, "plain_fallback": False}

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
WORDS = [f"w{i}" for i in range(100)]
CHAT_TEMPLATE = (
    "{% for message in messages %}<s> {{ message['role'] }} "
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }} </s>{% endgeneration %}"
    "{% else %}{{ message['content'] }} </s>{% endif %} {% endfor %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; the vocabulary fits the `tiny_llama` of the tests."""
    words = [*SPECIAL, "user", "assistant", *WORDS]
    found = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=found, chat_template=CHAT_TEMPLATE, **names)


def words(start: int, count: int) -> str:
    """`count` words that look random and are always the same."""
    return " ".join(WORDS[(start * 37 + 11 * i * i + i) % len(WORDS)] for i in range(count))


def prompt_completion(count: int = 16) -> Dataset:
    """Long prompts of different lengths, short completions."""
    rows = [(words(i, 20 + 3 * (i % 4)), words(i + 50, 3 + i % 2)) for i in range(count)]
    return Dataset.from_dict({"prompt": [p for p, _ in rows], "completion": [c for _, c in rows]})


def conversations(count: int = 16) -> Dataset:
    """Two turns each: long questions, short answers."""
    turns = [(words(i, 12 + i % 3), words(i + 1, 2), words(i + 2, 10), words(i + 3, 3)) for i in range(count)]
    roles = ("user", "assistant", "user", "assistant")
    return Dataset.from_dict(
        {
            "messages": [
                [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)] for texts in turns
            ]
        }
    )


def texts(count: int = 16) -> Dataset:
    """Plain language modelling: labels everywhere."""
    return Dataset.from_dict({"text": [words(i, 14 + 3 * (i % 4)) for i in range(count)]})


def arguments(folder, seek="stock", **options) -> SFTConfig:
    """`TokenSeekSFTConfig` with `seek`; trl's own `SFTConfig` where it is not given."""
    values = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        # Adam would make a step out of a rounding in a gradient near zero
        "optim": "sgd",
        "learning_rate": 0.3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        **options,
    }
    return SFTConfig(**values) if isinstance(seek, str) else TokenSeekSFTConfig(seek=seek, **values)


def trainer(model, args, data=None, kind=TokenSeekSFTTrainer, **options) -> SFTTrainer:
    """A trainer of `kind` over `data`, by default [`prompt_completion`]."""
    data = prompt_completion() if data is None else data
    return kind(model, args, train_dataset=data, processing_class=tokenizer(), **options)


def run(model, args, data=None, kind=TokenSeekSFTTrainer, **options) -> SFTTrainer:
    """The same, trained."""
    own = trainer(model, args, data, kind, **options)
    own.train()
    return own


def logged(trainer: SFTTrainer, *keys: str) -> list[list[float]]:
    """One list a key of its values in the training logs."""
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [[entry[key] for entry in logs] for key in keys]
