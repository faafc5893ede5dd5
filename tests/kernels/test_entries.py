"""The tables of addresses of the masked steps."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")


def test_no_table_is_made_under_capture(monkeypatch):
    """A graph would copy it again at each replay, from memory that is gone; one that is kept is no copy."""
    from fishkern.kernels import _entries

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="do the masked step once before"):
        _entries._to_device(torch.zeros(1), torch.device("cuda", 0))
    params, grads = [torch.zeros(3)], [torch.ones(3)]
    first, second = (_entries.tables(params, grads, [None])[0] for _ in range(2))
    assert first is second
