"""Real text that every machine holds, to pre-train on: the source files of the Python standard library."""

from collections.abc import Iterator, Sequence
from itertools import chain

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from recipes.python_docstrings import SPLITS, module_splits, read_source, standard_library, top_level

END_OF_FILE = "<|endoftext|>"
# a token for each byte, and the end of a file
SMALLEST_VOCABULARY = 257


def source_files(split: str) -> Iterator[str]:
    """The files of the standard library's modules in `split`; no top-level module (or package) is in two splits.

    Raises:
        `ValueError`: if `split` is unknown.
    """
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}. The standard library's source has {', '.join(SPLITS)}.")
    split_of = module_splits()
    return (read_source(path) for name, path in standard_library() if split_of.get(top_level(name)) == split)


def train_tokenizer(files: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `files`; the same text gives the same tokenizer.

    Raises:
        `ValueError`: if `vocab_size` has no room for the 256 bytes and the end of a file, or the text is too short
            for so many tokens.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"vocab_size={vocab_size} has no room for the 256 bytes and {END_OF_FILE!r}. Set --vocab_size "
            f"{SMALLEST_VOCABULARY} or more."
        )
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_FILE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(files, trainer)
    if model.get_vocab_size() < vocab_size:
        raise ValueError(
            f"The text is too short for vocab_size={vocab_size}: it gives {model.get_vocab_size()} tokens. Set "
            f"--vocab_size {model.get_vocab_size()} or less."
        )
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token=END_OF_FILE, pad_token=END_OF_FILE)


def cut(files: Sequence[str], tokenizer: PreTrainedTokenizerFast, length: int) -> list[dict[str, list[int]]]:
    """The files, one after the other with an end token behind each, cut into sequences of `length` labelled tokens.

    Returns:
        `list[dict[str, list[int]]]`: `input_ids` and `labels`; the last piece of the text, which is shorter, is left
        out.
    """
    encoded = tokenizer(files, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    ids = list(chain.from_iterable([*file, tokenizer.eos_token_id] for file in encoded))
    pieces = (ids[first : first + length] for first in range(0, len(ids) - length + 1, length))
    return [{"input_ids": piece, "labels": piece} for piece in pieces]
