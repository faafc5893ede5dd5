"""The ordinary tests find planted errors."""

from __future__ import annotations

import pytest

from tests.kernels import mutants

pytest.importorskip("triton")


def test_every_operation_with_a_kernel_has_mutants():
    """And the text that each changes is in its file once."""
    kernels = {path.stem for path in (mutants.ROOT / "kernels").glob("[!_]*.py")}
    assert mutants.MUTANTS.keys() == mutants.TESTS.keys() == kernels
    assert all(len(planted) >= 5 for planted in mutants.MUTANTS.values())
    for planted in mutants.MUTANTS.values():
        for name, (file, right, wrong) in planted.items():
            assert right != wrong
            assert (mutants.ROOT / file).read_text().count(right) == 1, name


@pytest.mark.slow
@pytest.mark.parametrize("operation", mutants.MUTANTS)
def test_no_mutant_survives(operation: str):
    assert not mutants.survivors([operation])
