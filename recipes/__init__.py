"""Ready-to-run training recipes; run them from the root of the checkout, e.g. `python -m recipes.sft --help`."""
