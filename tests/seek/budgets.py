"""Every score with what it can choose."""

import pytest

from hf_tokenseek.seek.config import OF_LABELS, SCORES


def scored(budgets: list[dict]) -> list:
    """Each score with each of `budgets`; those that know labelled rows only choose no evidence rows."""
    pairs = [
        (score, budget)
        for score in SCORES
        for budget in budgets
        if score not in OF_LABELS or "ratio" in budget or budget.get("context") in (0.0, 1.0)
    ]
    return [pytest.param(score, budget, id=f"{score}-{budget}") for score, budget in pairs]
