"""The case of fused experts: what it compares is the same in small."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
from benchmarks.cases import experts


def test_all_providers_give_the_same_and_each_takes_its_path():
    case = experts.Case(16, 12, layers=2, N=3, T=7, batches=2)
    model, data = case.model(), case.data()
    results = {name: experts.provider(name, model, data)() for name in experts.PROVIDERS}
    for name, result in results.items():
        assert result.keys() == results["one_by_one"].keys()
        for key, values in results["one_by_one"].items():
            torch.testing.assert_close(result[key], values, rtol=1e-4, atol=1e-6 * values.max().item())
        if name != "one_by_one":
            path = "fused" if name == "fishkern" else "generic"
            assert {result.coverage[key].path for key in result} == {path}


def test_goals_are_those_of_the_sizes_that_are_measured():
    assert [(case.hidden, case.N, case.faster >= 1.2, case.of_loop) for case in experts.CASES] == [
        (256, 16, True, None), (2048, 16, False, 1.25), (2048, 16, False, 1.25)
    ]  # fmt: skip
