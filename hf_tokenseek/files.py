"""Files that an interruption cannot leave half written."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(file: Path) -> Iterator[Path]:
    """Gives a path beside `file` to write to, in a folder that is there, and puts what was written in its place."""
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_name(f"{file.name}.tmp")
    yield scratch
    os.replace(scratch, file)
