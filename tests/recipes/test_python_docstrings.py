import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from recipes.python_docstrings import SPLITS, documented_functions, first_sentence, python_docstrings

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Return the sum.", "Return the sum."),
        ("Return the sum.\n\nArgs: none.", "Return the sum."),
        ("Return the\n    sum. It may overflow.", "Return the sum."),
        ("Open os.path, e.g. this one. Then stop.", "Open os.path, e.g. this one."),
        ("Is it so? Perhaps.", "Is it so?"),
        ("No full stop", "No full stop"),
    ],
)
def test_first_sentence(docstring, sentence):
    assert first_sentence(docstring) == sentence


def test_source_comes_without_its_docstring():
    code = textwrap.dedent(
        '''
        class Box:
            @property
            def size(
                self,
            ):
                """The size.

                In metres.
                """
                # kept
                return "a string that stays"

        def bare():
            return 1

        def only():
            """Nothing but this."""

        def shared(): "On the line of the header."; return 1

        async def later():
            "Wait."
            await now
        '''
    )
    assert dict(documented_functions(code)) == {
        '@property\ndef size(\n    self,\n):\n    # kept\n    return "a string that stays"': "The size.\n\nIn metres.",
        "async def later():\n    await now": "Wait.",
    }


def test_the_task_is_large_unique_and_split_by_module():
    examples = {split: python_docstrings(split) for split in SPLITS}
    total = sum(len(records) for records in examples.values())
    assert total >= 500
    for records in examples.values():
        assert len(records) >= total * 0.05
    everything = [record for records in examples.values() for record in records]
    assert len({record["prompt"] for record in everything}) == total
    assert len({record["completion"].lower() for record in everything}) == total
    owners = [{record["module"].partition(".")[0] for record in records} for records in examples.values()]
    assert sum(len(modules) for modules in owners) == len(set.union(*owners))


def test_no_prompt_holds_its_answer_as_a_docstring():
    for record in python_docstrings("test"):
        assert f'"""{record["completion"]}' not in record["prompt"]


def test_a_length_limit_keeps_order_and_splits():
    short = python_docstrings("train", max_characters=1000)
    kept = [record for record in python_docstrings("train") if record in short]
    assert kept == short
    assert 0 < len(short) < len(python_docstrings("train"))


def test_the_order_is_the_same_in_another_process():
    script = "from recipes.python_docstrings import *; print([r['module'] for r in python_docstrings('test')])"
    fresh = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert fresh.stdout.strip() == str([record["module"] for record in python_docstrings("test")])
