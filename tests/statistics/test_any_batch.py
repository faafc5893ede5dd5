"""Any batch gives the result of the loop over its rows, or is refused; the test knows the rows of each example."""

from __future__ import annotations

import traceback
from collections import UserDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fishkern as fk

PACKAGE = Path(fk.__file__).parent
Two = namedtuple("Two", "a b")


@dataclass(frozen=True)
class Kind:
    """A form that an entry of a batch may have.

    Args:
        make: Draws a value for ``N`` examples.
        cut: What the value is for example ``n`` alone; ``None`` where all examples share it.
    """

    make: Callable[[Any, int], Any]
    cut: Callable[[Any, int], Any] | None

    def alone(self, value: Any, n: int) -> Any:
        return value if self.cut is None else self.cut(value, n)


def numbers(draw, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    return torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1


def few(draw) -> int:
    return draw(st.integers(1, 5))


def row(value: Any, n: int) -> Any:
    return value[n : n + 1]


ROWS = {
    "tensor": Kind(lambda draw, N: numbers(draw, N, few(draw)), row),
    "array": Kind(lambda draw, N: numbers(draw, N, few(draw)).numpy(), row),
    "words": Kind(lambda draw, N: [draw(st.text("abcdefg", min_size=1, max_size=3)) for _ in range(N)], row),
    "lengths": Kind(lambda draw, N: [few(draw) for _ in range(N)], row),
    "lists": Kind(lambda draw, N: [[few(draw) for _ in range(few(draw))] for _ in range(N)], row),
    "ragged": Kind(lambda draw, N: [numbers(draw, few(draw), 2) for _ in range(N)], row),
    "boxes": Kind(lambda draw, N: [{"box": numbers(draw, few(draw), 2)} for _ in range(N)], row),
    "several": Kind(
        lambda draw, N: [numbers(draw, N, 2) for _ in range(few(draw))], lambda v, n: [row(x, n) for x in v]
    ),
    "mapping": Kind(
        lambda draw, N: {"a": numbers(draw, N, 2), "b": {"c": numbers(draw, N)}},
        lambda v, n: {"a": row(v["a"], n), "b": {"c": row(v["b"]["c"], n)}},
    ),
    "user mapping": Kind(lambda draw, N: UserDict(a=numbers(draw, N)), lambda v, n: UserDict(a=row(v["a"], n))),
    "tuple": Kind(
        lambda draw, N: (numbers(draw, N, 2), (numbers(draw, N),)), lambda v, n: (row(v[0], n), (row(v[1][0], n),))
    ),
    "named": Kind(lambda draw, N: Two(numbers(draw, N), numbers(draw, N)), lambda v, n: Two(row(v.a, n), row(v.b, n))),
}
OF_ALL = {
    "weights": Kind(lambda draw, N: numbers(draw, draw(st.integers(1, 6))), None),
    "broadcast": Kind(lambda draw, N: numbers(draw, 1, few(draw)), None),
    "number": Kind(lambda draw, N: draw(st.sampled_from([2.5, 3, True, None, torch.tensor(4.0)])), None),
    "word": Kind(lambda draw, N: draw(st.text("abcdefg", min_size=1, max_size=6)), None),
    "size": Kind(lambda draw, N: tuple(few(draw) for _ in range(few(draw))), None),
    "table": Kind(lambda draw, N: [few(draw) for _ in range(few(draw))], None),
}
KINDS = {**ROWS, **OF_ALL}


def weigh(value: Any) -> Tensor:
    """Make one number of all that a value holds."""
    if isinstance(value, Tensor | np.ndarray):
        flat = torch.as_tensor(value, dtype=torch.float64).flatten()
        return (flat * torch.arange(1, len(flat) + 1)).sum()
    if isinstance(value, str):
        return torch.tensor(float(sum(map(ord, value))), dtype=torch.float64) / 100
    if value is None or isinstance(value, int | float):
        return torch.tensor(float(value or 0), dtype=torch.float64)
    parts = value.values() if hasattr(value, "values") else value
    return sum((weigh(part) * (place + 2) for place, part in enumerate(parts)), torch.zeros((), dtype=torch.float64))


@st.composite
def runs(draw) -> tuple[list[str], list[Any], list[Any], list[Any]]:
    """Draw the kinds of some entries, batches of them, the rows of these batches, and the keys passed as shared."""
    kinds = draw(st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=3))
    as_mapping = draw(st.booleans())
    keys = [f"e{place}" for place in range(len(kinds))] if as_mapping else list(range(1, len(kinds) + 1))
    shared = [key for key, kind in zip(keys, kinds, strict=True) if kind in OF_ALL and draw(st.booleans())]

    def made(values: list[Any]) -> Any:
        return dict(zip(["x", *keys], values, strict=True)) if as_mapping else tuple(values)

    batches, rows = [], []
    for N in draw(st.lists(st.sampled_from([2, 3, 4, 5, 1]), min_size=1, max_size=3)):
        x, values = numbers(draw, N, 3), [KINDS[kind].make(draw, N) for kind in kinds]
        batches.append(made([x, *values]))
        for n in range(N):
            alone = [KINDS[kind].alone(value, n) for kind, value in zip(kinds, values, strict=True)]
            rows.append(made([row(x, n), *alone]))
    return kinds, batches, rows, shared


def assert_ours(refusal: Exception) -> None:
    frame = traceback.extract_tb(refusal.__traceback__)[-1]
    assert Path(frame.filename).is_relative_to(PACKAGE)
    assert "\n" not in str(refusal)


@pytest.mark.filterwarnings("ignore:.*slow exact path")
@settings(max_examples=120, deadline=None)
@given(runs(), st.booleans())
def test_any_batch_is_that_of_its_rows_or_refused(run, check):
    kinds, batches, rows, shared = run
    model = nn.Linear(3, 2).double()

    def losses(model: nn.Module, batch: Any) -> Tensor:
        x, *values = batch.values() if isinstance(batch, dict) else batch
        factors = [
            sum((weigh(KINDS[kind].alone(value, n)) for kind, value in zip(kinds, values, strict=True)), torch.ones(()))
            for n in range(len(x))
        ]
        return model(x).square().sum(1) * torch.stack(factors)

    try:
        statistics = fk.estimate(model, batches, likelihood=losses, shared=shared, check=check)
    except (ValueError, TypeError) as refusal:
        assert_ours(refusal)
        return
    expected = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for one in rows:
        grads = torch.autograd.grad(losses(model, one).sum(), list(model.parameters()))
        for name, grad in zip(expected, grads, strict=True):
            expected[name] += grad.square() / len(rows)
    for name, value in expected.items():
        torch.testing.assert_close(statistics[name], value.float())
