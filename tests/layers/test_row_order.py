"""The order of rows: which are an example's, and that all ways to ask agree."""

from __future__ import annotations

import pytest
import torch

from fishkern.layers.row_order import ONE_EACH, RowOrder, orders

ORDERS = [ONE_EACH, *(RowOrder(G, adjacent=adjacent) for G in (2, 3) for adjacent in (True, False))]


def test_pairs_by_hand():
    halves, interleaved = RowOrder(2, adjacent=False), RowOrder(2, adjacent=True)
    rows = torch.tensor([10, 20, 30, 11, 21, 31])  # chosen and rejected answers of three pairs
    assert [rows[halves.rows(n, 3)].tolist() for n in range(3)] == [[10, 11], [20, 21], [30, 31]]
    assert halves.by_example(rows, 3).tolist() == [10, 11, 20, 21, 30, 31]
    assert halves.joined(rows[:, None], 3).tolist() == [[10, 11], [20, 21], [30, 31]]
    assert rows[halves.indices(1, 3, 3)].tolist() == [20, 30, 21, 31]
    rows = torch.tensor([10, 11, 20, 21, 30, 31])
    assert [rows[interleaved.rows(n, 3)].tolist() for n in range(3)] == [[10, 11], [20, 21], [30, 31]]
    assert interleaved.by_example(rows, 3) is rows
    assert rows[interleaved.indices(1, 3, 3)].tolist() == [20, 21, 30, 31]


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("N", [1, 4])
def test_all_ways_agree(order, N):
    owners = order.owners(N)
    assert len(owners) == order.count(N)
    for n in range(N):
        assert owners[order.rows(n, N)].tolist() == [n] * order.per_example
    assert order.by_example(owners, N).tolist() == sorted(owners.tolist())
    assert order.joined(owners[:, None], N).tolist() == [[n] * order.per_example for n in range(N)]
    flattened = owners.repeat_interleave(3)  # with three positions each
    assert order.by_example(flattened, N).tolist() == sorted(flattened.tolist())
    part = owners[order.indices(0, N - 1, N)]
    assert part.tolist() == order.owners(N - 1).tolist()


def test_possible_orders():
    assert list(orders(4, 4)) == [ONE_EACH]
    assert list(orders(8, 4)) == [RowOrder(2, adjacent=True), RowOrder(2, adjacent=False)]
    assert list(orders(3, 1)) == [RowOrder(3, adjacent=True)]
    assert not list(orders(7, 4)) + list(orders(0, 4))
