"""Arguments become plain values, or one line that names them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from fishkern.arguments import count_of, fraction_of, integer, one_of


@pytest.mark.parametrize("three", [3, np.int32(3), torch.tensor(3)])
def test_integers_of_any_library_become_plain(three):
    for read in (lambda value: integer(value, "seed"), count_of):
        assert json.dumps(read(three)) == "3"


@pytest.mark.parametrize("half", [0.5, np.float32(0.5), torch.tensor(0.5)])
def test_fractions_of_any_library_become_plain(half):
    assert json.dumps(fraction_of(half)) == "0.5"
    assert fraction_of(1) == 1.0


@pytest.mark.parametrize(
    ("error", "read", "says"),
    [
        (TypeError, lambda: integer(2.0, "seed"), r"seed must be an integer, got 2\.0"),
        (TypeError, lambda: integer(True, "seed"), "seed must be an integer, got True"),
        (TypeError, lambda: count_of("3"), "k must be an integer, got '3'"),
        (ValueError, lambda: count_of(-1, "n"), "n must be at least 0, got -1"),
        (TypeError, lambda: fraction_of(torch.rand(2)), r"density must be a number, got tensor"),
        (ValueError, lambda: fraction_of(0, "keep"), "keep must be above 0 and at most 1, got 0.0"),
        (ValueError, lambda: fraction_of(float("nan")), "density must be above 0 and at most 1, got nan"),
        (ValueError, lambda: one_of("up", ("a", "b"), "order"), r"order must be one of \('a', 'b'\), got 'up'"),
    ],
)
def test_what_they_refuse(error, read, says):
    with pytest.raises(error, match=says):
        read()
    assert one_of("a", ("a", "b"), "order") == "a"
