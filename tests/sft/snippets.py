"""Runs the Python snippets of a page of the documentation, as they stand there."""

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"
# a page's runs, made tiny: one step on this machine's CPU
TINY = 'output_dir="out", max_steps=1, use_cpu=True, bf16=False, report_to=[], logging_steps=1, save_strategy="no"'


def snippets(page: str) -> list[str]:
    """The page's blocks of Python, their runs made tiny."""
    found = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    assert found and all('output_dir="out"' in code for code in found)
    return [code.replace('output_dir="out"', TINY) for code in found]


def run_snippet(code: str, **names) -> dict:
    """Executes `code` with `names`; what it has defined."""
    exec(compile(code, "snippet", "exec"), names)
    return names
