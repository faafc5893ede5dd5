"""One sentence that many tests say: the estimate equals the batch-size-1 loop."""

from __future__ import annotations

import torch

import fishkern as fk
from tests.support.oracle import squares_one_by_one, worst_error
from tests.support.zoo import Specimen

LIMIT = {torch.float64: 1e-6, torch.float32: 1e-4}


def as_dtype(batch: dict, dtype: torch.dtype) -> dict:
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}


def assert_exact(
    specimen: Specimen, batches: list[dict], dtype: torch.dtype = torch.float64, **options
) -> fk.Statistics:
    """Estimate in ``dtype`` and compare with a float64 loop over the same examples."""
    model = specimen.model.to(dtype)
    statistics = fk.estimate(model, [as_dtype(batch, dtype) for batch in batches], **options)
    truth = squares_one_by_one(model.double(), [as_dtype(batch, torch.float64) for batch in batches], specimen.loss)
    error, name = worst_error(statistics, truth, dtype)
    assert error < LIMIT[dtype], f"{name}: relative error {error:.1e} in {dtype}, by {statistics.coverage[name].path}"
    return statistics


def paths(statistics: fk.Statistics) -> dict[str, set[str]]:
    """Parameters by the path that served them."""
    by_path: dict[str, set[str]] = {}
    for name, covered in statistics.coverage.items():
        by_path.setdefault(covered.path, set()).add(name)
    return by_path
