"""The tasks, on data of which every piece says where it comes from."""

import re

import pytest

from recipes.python_docstrings import INSTRUCTION, SPLITS
from tests.tiny_folder import tiny_tokenizer

# split, module or file, and function
MARK = re.compile(r"(train|validation|test)_(\d)_(\d)")
LENGTH = 400


def functions(split, max_characters=3000):
    """Six functions in each of two modules, from a tenth of the length to more than it."""
    for number in range(6):
        for module in range(2):
            mark = f"{split}_{module}_{number}"
            source = "\n".join([mark] * (4 + 10 * number))
            yield {"prompt": f"{INSTRUCTION}\n\n{source}", "completion": f"Says {mark}.", "module": f"{split}{module}"}


def files(split):
    return ("\n".join(f"{split}_{number}_0 line {line}" for line in range(200)) for number in range(4))


@pytest.fixture
def tasks(script, monkeypatch, tmp_path):
    tasks = script("bench_tasks")
    monkeypatch.setattr(tasks, "python_docstrings", lambda *args, **kwargs: list(functions(*args, **kwargs)))
    monkeypatch.setattr(tasks, "source_files", files)
    nouns = tmp_path / "data.noun"
    synsets = [f"{i:08d} 03 n 01 noun{i} 0 000 | the meaning of number {i}; as in noun{i}  " for i in range(1200)]
    nouns.write_text("\n".join(["  1 licence", *synsets, "00000000 03 n 01 short 0 000 | too short"]) + "\n")
    monkeypatch.setattr(tasks, "WORDNET_NOUNS", nouns)
    return tasks


def decoded(task, split):
    """Texts of a split, and what is labelled in each."""
    tokenizer = tiny_tokenizer()
    encoded = task(tokenizer, split, LENGTH)
    assert encoded and all(len(item["input_ids"]) == len(item["labels"]) <= LENGTH for item in encoded)
    labelled = ([label for label in item["labels"] if label != -100] for item in encoded)
    return [
        (tokenizer.decode(item["input_ids"]), tokenizer.decode(own))
        for item, own in zip(encoded, labelled, strict=True)
    ]


@pytest.mark.parametrize("name", ["docstrings", "long_prompts", "source_text"])
def test_splits_share_nothing(tasks, name):
    for split in SPLITS:
        texts = decoded(getattr(tasks, name), split)
        marks = [MARK.findall(text) for text, _ in texts]
        assert all(marks) and {mark[0] for found in marks for mark in found} == {split}
        assert len(set(texts)) == len(texts)


def test_splits_of_glosses_share_no_meaning(tasks):
    numbers = {split: [] for split in SPLITS}
    for split, found in numbers.items():
        for text, answer in decoded(tasks.glosses, split):
            found.append(re.search(r"noun(\d+)", text)[1])
            assert answer == f"the meaning of number {found[-1]}<|im_end|>"
    assert [len(numbers[split]) for split in ("test", "validation", "train")] == [500, 500, 200]
    assert len(set().union(*numbers.values())) == 1200


def test_long_prompts_have_one_length_and_others_of_their_module_first(tasks):
    tokenizer = tiny_tokenizer()
    assert {len(item["input_ids"]) for item in tasks.long_prompts(tokenizer, "test", LENGTH)} == {LENGTH}
    texts = decoded(tasks.long_prompts, "test")
    alone = []
    for text, answer in texts:
        marks = MARK.findall(text.rpartition("<|im_start|>assistant")[0])
        own = MARK.search(answer).groups()
        assert marks[-1] == own and {module for _, module, _ in marks} == {own[1]}
        alone.append(set(marks) == {own})
    # those that are long enough come first, and the others are not left out
    assert alone == sorted(alone, reverse=True) and len(texts) == 12 and 0 < sum(alone) < 12


def test_source_text_is_labelled_everywhere_and_no_file_outweighs_others(tasks):
    texts = decoded(tasks.source_text, "test")
    assert all(text == labelled for text, labelled in texts)
    assert sorted(MARK.search(text)[2] for text, _ in texts) == ["0", "0", "1", "1", "2", "2", "3", "3"]
