import re
import shlex
from pathlib import Path

import torch

from hf_tokenseek.cli import main
from tests.sft.snippets import run_snippet

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "memory.md").read_text()


def test_the_snippet_runs(tiny_llama, capsys):
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
    model = tiny_llama()
    ids = torch.arange(48).view(2, 24)
    optimizer = torch.optim.AdamW(model.parameters())
    run_snippet(code, model=model, ids=ids, labels=ids, optimizer=optimizer)
    assert "gradients" in capsys.readouterr().out


def test_the_command_prints_the_table(monkeypatch, capsys):
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    command = re.search(r"    hf-tokenseek (estimate.*?)\n\n", PAGE, flags=re.DOTALL).group(1)
    assert main(shlex.split(command.replace("\\\n", " "))) == 0
    printed = capsys.readouterr().out
    shown = re.search(r"    GiB .*?\n\n", PAGE, flags=re.DOTALL).group()
    for line in shown.strip().splitlines():
        assert line.strip() in printed
