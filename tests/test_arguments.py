"""Arguments become plain values, or one line that names them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from fishkern.arguments import (
    at_least,
    count_of,
    fraction_of,
    integer,
    json_of,
    number,
    one_of,
    patterns_of,
    positive,
    several,
    share_of,
    weights_of,
)


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
        (TypeError, lambda: fraction_of(True), "density must be a number, got True"),
        (TypeError, lambda: number(torch.tensor(True), "margin"), r"margin must be a number, got tensor\(True\)"),
        (TypeError, lambda: several(4, "bits"), "bits must be several, such as a list, got 4"),
        (TypeError, lambda: several("48", "bits"), "bits must be several, such as a list, got '48'"),
        (TypeError, lambda: several(torch.tensor(4), "bits"), r"bits must be several, .* got tensor\(4\)"),
        (TypeError, lambda: weights_of(5, 2, "models"), "weights must be several, such as a list, got 5"),
        (TypeError, lambda: weights_of(["a", 1], 2, "models"), "weights must be a number, got 'a'"),
        (ValueError, lambda: weights_of([1], 2, "models"), r"for each of the 2 models, .* got \[1.0\]"),
        (ValueError, lambda: weights_of([1, float("nan")], 2, "models"), r"got \[1.0, nan\]"),
        (ValueError, lambda: at_least(1, 0, "rank"), "rank must be at least 1, got 0"),
        (ValueError, lambda: positive(float("inf"), "lr"), "lr must be a positive number, got inf"),
        (ValueError, lambda: share_of(1.5, "decay"), "decay must be from 0 to 1, got 1.5"),
        (ValueError, lambda: share_of(float("nan"), "decay"), "decay must be from 0 to 1, got nan"),
        (ValueError, lambda: patterns_of(["*.bias", 3], "never"), r"never takes patterns .*; got \('\*.bias', 3\)"),
        (TypeError, lambda: json_of({"x": object()}, "provenance"), "provenance must be JSON: Object of type object"),
        (TypeError, lambda: json_of({"x": float("nan")}, "provenance"), "provenance must be JSON: "),
        (ValueError, lambda: one_of("up", ("a", "b"), "order"), r"order must be one of \('a', 'b'\), got 'up'"),
    ],
)
def test_what_they_refuse(error, read, says):
    with pytest.raises(error, match=says):
        read()


def test_what_they_accept():
    assert one_of("a", ("a", "b"), "order") == "a"
    assert patterns_of("*.bias", "always") == ("*.bias",)
    assert patterns_of(iter(["a", "b"]), "always") == ("a", "b")
    assert (share_of(0, "decay"), share_of(np.float32(1), "decay")) == (0.0, 1.0)
    assert json.loads(json_of({"k": [1, None]}, "provenance")) == {"k": [1, None]}
