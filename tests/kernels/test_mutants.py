"""The ordinary tests find planted errors."""

from __future__ import annotations

import pytest

from tests.kernels import mutants

pytest.importorskip("triton")


@pytest.mark.slow
def test_no_mutant_survives():
    assert len(mutants.MUTANTS) >= 5
    assert not mutants.survivors(list(mutants.MUTANTS))
