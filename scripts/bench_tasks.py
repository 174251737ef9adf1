"""The data of the fidelity and quality benches: three tasks, from prompts with short answers to labels everywhere."""

import random
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from recipes.data import encode
from recipes.python_docstrings import INSTRUCTION, python_docstrings
from recipes.source_text import source_files

Encoded = list[dict[str, list[int]]]
WORDNET_NOUNS = Path("/usr/share/wordnet/data.noun")


def docstrings(tokenizer: PreTrainedTokenizerBase, split: str, max_length: int) -> Encoded:
    """Long prompt, short answer: a function's source, and the first sentence of its docstring (about 5 % labels)."""
    records = python_docstrings(split)
    return [encode(record, tokenizer, max_length) for record in records]


def long_prompts(tokenizer: PreTrainedTokenizerBase, split: str, max_length: int) -> Encoded:
    """
    The docstring task in sequences of exactly `max_length` tokens; longer ones lose their left end. Functions that are
    too short follow at the end, behind other functions of their module.
    """
    records = python_docstrings(split, max_characters=20_000)
    by_module: dict[str, list[str]] = {}
    for record in records:
        by_module.setdefault(record["module"], []).append(record["prompt"].removeprefix(INSTRUCTION).strip())
    lengthened = []
    for record in records:
        source = record["prompt"].removeprefix(INSTRUCTION).strip()
        others = [other for other in by_module[record["module"]] if other != source]
        lengthened.append({**record, "prompt": "\n\n".join([INSTRUCTION, *others, source])})
    encoded, longer = ([encode(r, tokenizer, max_length) for r in part] for part in (records, lengthened))
    own = [len(item["input_ids"]) == max_length for item in encoded]
    spare = [item for item, fits in zip(longer, own, strict=True) if not fits]
    return [item for item in [*encoded, *spare] if len(item["input_ids"]) == max_length]


def source_text(tokenizer: PreTrainedTokenizerBase, split: str, max_length: int) -> Encoded:
    """Labels everywhere: the standard library's files as plain text, cut into sequences of `max_length` tokens."""
    sequences = []
    for file in source_files(split):
        ids = tokenizer(file[:40_000], add_special_tokens=False)["input_ids"]
        # two sequences a file at most, so that no file outweighs the others
        for start in range(0, min(len(ids), 2 * max_length) - max_length + 1, max_length):
            piece = ids[start : start + max_length]
            sequences.append({"input_ids": piece, "labels": list(piece)})
    random.Random(0).shuffle(sequences)
    return sequences


def glosses(tokenizer: PreTrainedTokenizerBase, split: str, max_length: int) -> Encoded:
    """
    Short prompt, short answer: define a noun of WordNet 3.0 (Debian package `wordnet-base`). A noun with several
    meanings may be in two splits, each time with another of them.
    """
    if not WORDNET_NOUNS.is_file():
        raise FileNotFoundError(f"{WORDNET_NOUNS} is missing. Install WordNet: apt-get install wordnet-base.")
    records = []
    for line in WORDNET_NOUNS.read_text(encoding="utf-8").splitlines():
        if line.startswith("  "):
            continue  # the licence
        fields, _, gloss = line.partition(" | ")
        word, definition = fields.split()[4].replace("_", " "), gloss.partition(";")[0].strip()
        if len(definition.split()) >= 4:
            records.append({"prompt": f"Define the noun {word}.", "completion": definition})
    random.Random(0).shuffle(records)
    start = {"test": 0, "validation": 500, "train": 1000}[split]
    stop = None if split == "train" else start + 500
    return [encode(record, tokenizer, max_length) for record in records[start:stop][:2000]]


TASKS: dict[str, Callable[[PreTrainedTokenizerBase, str, int], Encoded]] = {
    "docstrings": docstrings,
    "source-text": source_text,
    "glosses": glosses,
}
