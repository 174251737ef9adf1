"""A real long-prompt, short-answer task that every machine holds: say in one sentence what a Python function does.

The functions of the Python standard library are read from the installed interpreter: the source without its docstring
is the prompt, the docstring's first sentence the answer. Nothing is downloaded and nothing is imported.
"""

import ast
import hashlib
import re
import sys
import sysconfig
import textwrap
import tokenize
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

INSTRUCTION = "Write the first sentence of the docstring of this Python function."
SPLITS = ("train", "validation", "test")
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages"}

MIN_SOURCE_CHARACTERS = 500
MIN_ANSWER_WORDS, MAX_ANSWER_WORDS = 3, 40
HELD_OUT_SHARE = 0.12

Function = ast.FunctionDef | ast.AsyncFunctionDef


def python_docstrings(split: str = "train", max_characters: int = 3000) -> list[dict[str, str]]:
    """Examples of the task, in an order that depends on nothing but the installed standard library.

    No function and no answer occurs twice, and no top-level module (or package) has functions in two splits.

    Args:
        split (`str`, *optional*, defaults to `"train"`):
            One of `"train"`, `"validation"`, `"test"`.
        max_characters (`int`, *optional*, defaults to 3000):
            Leave out functions with longer source; source takes about 3.5 characters a token.

    Returns:
        `list[dict[str, str]]`: records with `prompt` (instruction and source), `completion` (one sentence) and
        `module` (dotted name of the file).

    Raises:
        `ValueError`: if `split` is unknown.
    """
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}. The task `python-docstrings` has {', '.join(SPLITS)}.")
    split_of = module_splits()
    return [
        {"prompt": f"{INSTRUCTION}\n\n{source}", "completion": answer, "module": module}
        for module, source, answer in _all_functions()
        if split_of[top_level(module)] == split and len(source) <= max_characters
    ]


def first_sentence(docstring: str) -> str:
    """The first sentence of a docstring's first paragraph, on one line."""
    paragraph = " ".join(docstring.strip().partition("\n\n")[0].split())
    # a sentence ends at a full stop before a capital letter: "e.g. this" and "os.path" go on
    return re.split(r"(?<=[.!?])\s+(?=[A-Z])", paragraph, maxsplit=1)[0]


def documented_functions(code: str) -> Iterator[tuple[str, str]]:
    """Pairs of a function's source without its docstring, and the docstring, for each one in a file's `code`."""
    lines = code.splitlines()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, Function) and ast.get_docstring(node) and _docstring_stands_alone(node, lines):
            yield _source_without_docstring(node, lines), ast.get_docstring(node)


def _docstring_stands_alone(node: Function, lines: list[str]) -> bool:
    """Whether code follows the docstring and neither shares a line with it."""
    docstring = node.body[0]
    before = lines[docstring.lineno - 1].encode()[: docstring.col_offset]
    return len(node.body) > 1 and not before.strip() and node.body[1].lineno > docstring.end_lineno


def _source_without_docstring(node: Function, lines: list[str]) -> str:
    docstring = node.body[0]
    start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    kept = lines[start - 1 : docstring.lineno - 1] + lines[docstring.end_lineno : node.end_lineno]
    return textwrap.dedent("\n".join(kept)).strip()


@cache
def _all_functions() -> tuple[tuple[str, str, str], ...]:
    """(module, source, answer) of every useful function, each source and each answer once, ordered by hash."""
    found = [
        (module, source, first_sentence(docstring))
        for module, path in standard_library()
        for source, docstring in documented_functions(read_source(path))
    ]
    unique, seen = [], set()
    for module, source, answer in sorted(found, key=lambda item: _digest("\n".join(item))):
        # an answer met twice (overridden methods, copied helpers) would leak from one split into another
        keys = {" ".join(source.split()), answer.lower()}
        if _useful(source, answer) and not keys & seen:
            unique.append((module, source, answer))
            seen |= keys
    return tuple(unique)


@cache
def module_splits() -> dict[str, str]:
    """Split of every top-level module: in the order of their hashes the first ones fill test, the next validation."""
    functions = Counter(top_level(module) for module, _, _ in _all_functions())
    wanted = HELD_OUT_SHARE * functions.total()
    splits, filled = {}, Counter()
    for name in sorted(functions, key=_digest):
        splits[name] = next((split for split in ("test", "validation") if filled[split] < wanted), "train")
        filled[splits[name]] += functions[name]
    return splits


def top_level(module: str) -> str:
    """The package or module that a dotted name belongs to."""
    return module.partition(".")[0]


def _useful(source: str, answer: str) -> bool:
    return (
        len(source) >= MIN_SOURCE_CHARACTERS
        and MIN_ANSWER_WORDS <= len(answer.split()) <= MAX_ANSWER_WORDS
        and not answer.endswith(":")
    )


def standard_library() -> Iterator[tuple[str, Path]]:
    """Dotted module name and path of every source file of the standard library, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] in sys.stdlib_module_names and not SKIPPED_FOLDERS.intersection(parts):
            yield ".".join(parts).removesuffix(".__init__"), path


def read_source(path: Path) -> str:
    """A source file's text."""
    # honours the coding line of a file
    with tokenize.open(path) as file:
        return file.read()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
