"""Some cases of a quick test that run with the slow tests."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slowly(*values: Any) -> Any:
    """Mark one case of a test as slow."""
    return pytest.param(*values, marks=pytest.mark.slow)


def but_slowly(cases: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """Mark all cases as slow but those that are among the quick ones, as some must be."""
    cases = list(cases)
    assert any(case in quick for case in cases), f"none of {cases} is among the quick ones: mark the test as slow"
    return [case if case in quick else slowly(case) for case in cases]
