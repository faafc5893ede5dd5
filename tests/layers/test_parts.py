"""Parts of a batch: whole examples, each in one part, and no more positions than asked for."""

from __future__ import annotations

import pytest
import torch

from fishkern.layers import Documents, Span, of_part
from fishkern.layers.parts import parts_of


@pytest.mark.parametrize("most", [1, 7, 20, 100])
def test_rows(most):
    N, T = 5, 7
    parts = list(parts_of(N, T, None, most))
    assert [n for part in parts for n in range(N)[part.examples]] == list(range(N))
    marks = torch.arange(N * T).view(N, T)
    assert torch.cat([of_part(marks, part) for part in parts]).equal(marks)
    assert all(part.num_examples * T <= max(most, T) for part in parts)
    assert all(part.documents is None for part in parts)


SPANS = (Span(0, 0, 4), Span(0, 4, 6), Span(0, 8, 14), Span(1, 2, 5), Span(1, 5, 6))


@pytest.mark.parametrize("most", [1, 6, 8, 100])
def test_documents(most):
    """Positions 6 and 7 of the first row belong to a document that does not count."""
    documents = Documents((2, 16), SPANS)
    parts = list(parts_of(2, 16, documents, most))
    assert [n for part in parts for n in range(len(SPANS))[part.examples]] == list(range(len(SPANS)))
    marks = torch.arange(32).view(2, 16)
    for part in parts:
        taken = of_part(marks, part)
        assert taken.shape == part.documents.shape
        assert part.num_examples == part.documents.count
        assert taken.numel() <= most or part.num_examples == 1
        for n, span in enumerate(SPANS[part.examples]):
            assert part.documents.cut(taken, n).equal(marks[span.row : span.row + 1, span.start : span.stop])
