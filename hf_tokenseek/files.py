"""Files that an interruption cannot leave half written."""

import os
from pathlib import Path


def write_whole(file: Path, text: str) -> None:
    """Writes `text` beside the place of `file` and puts it there in one go; makes the folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_name(f"{file.name}.tmp")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, file)
