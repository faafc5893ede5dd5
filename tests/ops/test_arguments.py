"""Results may be written to any memory that overlaps no input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fishkern.ops import sum_grad_squared, sum_position_grad_squared
from fishkern.ops._arguments import accumulator, check_apart

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
O, I = 3, 4


def places(tensor: Tensor) -> list[int]:
    """The storage's offset of each entry."""
    base = torch.arange(tensor.untyped_storage().nbytes() // tensor.element_size())
    return base.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).flatten().tolist()


def pairs() -> list[tuple[Tensor, Tensor]]:
    """Views of one memory: columns, rows, every other one, transposes, the same with an offset."""
    base = torch.zeros(200)
    strides = [(4, 1), (1, 3), (8, 2), (8, 1), (1, 8), (9, 2), (40, 7)]
    offsets = [*range(13), 16, 24, 31, 40, 47]
    views = [base.as_strided((O, I), stride, offset) for stride in strides for offset in offsets]
    return [(views[n], view) for n in range(0, len(views), 5) for view in views]


def test_overlap_is_what_shared_places_are():
    """Refused wherever an entry is shared; allowed wherever none is and strides are the same, or one ends first."""
    allowed = refused = 0
    for first, second in pairs():
        shared = set(places(first)) & set(places(second))
        try:
            check_apart(first, second, "these")
        except ValueError:
            refused += 1
            apart = max(places(first)) < min(places(second)) or max(places(second)) < min(places(first))
            assert shared or (first.stride() != second.stride() and not apart)
        else:
            allowed += 1
            assert not shared
    assert min(allowed, refused) > 500


def test_one_row_and_nothing():
    """Strides of axes of one entry mean nothing, and a tensor without memory overlaps nothing."""
    row = torch.zeros(1, 8)
    check_apart(row[:, :4], row[:, 4:], "these")
    check_apart(row.T[:4], row.T[4:], "these")
    with pytest.raises(ValueError, match="these must not overlap"):
        check_apart(row[:, :4], row[:, 3:7], "these")
    check_apart(torch.zeros(0, 4), torch.zeros(0, 4), "these")
    check_apart(torch.zeros(3, 4, device="meta"), torch.zeros(3, 4, device="meta"), "these")


@pytest.mark.parametrize(
    "out",
    [torch.zeros(4).expand(3, 4), torch.zeros(3, 1).expand(3, 4), torch.zeros(8).as_strided((3, 4), (1, 1))],
    ids=["rows", "columns", "windows"],
)
def test_every_entry_has_its_place(out: Tensor, backend: str):
    """Both backends refuse results that would lose sums; without a check, the reference alone would raise at some."""
    x, g = torch.ones(2, 5, I), torch.ones(2, 5, O)
    for given in ({"out": out}, {"grad_out": out}):
        with pytest.raises(ValueError, match="must have a place for each entry"):
            sum_grad_squared(x, g, **given, backend=backend)
    with pytest.raises(ValueError, match="out must have a place for each entry"):
        sum_position_grad_squared(x, g, out=out)
    assert not out.any()


def test_axes_of_one_entry_may_be_expanded():
    out = torch.zeros(1, 4).expand(1, 4)[:, ::2]
    assert accumulator(out, (1, 2), out) is out
    assert accumulator(torch.zeros(4, 3).mT, (3, 4), out).shape == (3, 4)


def test_squares_and_sums_do_not_mix(backend: str):
    x, g, out = torch.ones(2, 5, I), torch.ones(2, 5, O), torch.zeros(O, 2 * I)
    x, g, out = x.to(DEVICE), g.to(DEVICE), out.to(DEVICE)
    for grad_out in (out[:, :I], out[:, I - 1 : -1]):
        with pytest.raises(ValueError, match="out and grad_out must not overlap"):
            sum_grad_squared(x, g, out=out[:, :I], grad_out=grad_out, backend=backend)
    assert not out.any()
    sum_grad_squared(x, g, out=out[:, :I], grad_out=out[:, I:], backend=backend)
    assert out.tolist() == [[50.0] * I + [10.0] * I] * O
