"""Ready-to-run training recipes: `python recipes/sft.py --help`."""
