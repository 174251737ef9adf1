"""`report.html`: what a run did, in one file for a browser. [`ReportCallback`] records and writes it."""

from importlib.util import find_spec

NEEDED = ("jinja2", "matplotlib")


def require_extra() -> None:
    """
    Says what is missing before anything is computed; imports nothing.

    Raises:
        ModuleNotFoundError: `jinja2` or `matplotlib` is not installed.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"report.html needs the packages {' and '.join(NEEDED)}, and {' and '.join(missing)} cannot be found. Run "
            "`pip install 'hf_tokenseek[report]'`, or go without the report (recipes: --report false).",
            name=missing[0],
        )
