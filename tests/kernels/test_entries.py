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
        _entries._Copied(torch.zeros(1), torch.device("cuda", 0))
    params, grads = [torch.zeros(3)], [torch.ones(3)]
    first, second = (_entries.tables(params, grads, [None])[0] for _ in range(2))
    assert first is second


class _Stream:
    """Stands for a stream of a device, and writes down what is asked of it."""

    def __init__(self, asked: list) -> None:
        self.asked = asked

    def record_event(self) -> str:
        return "made"

    def wait_event(self, event: str) -> None:
        self.asked.append((self, event))


def test_a_table_of_one_stream_is_waited_for_on_another(monkeypatch):
    """And stays in memory while that one reads it; a graph keeps what it has captured, which the caches may forget."""
    from fishkern.kernels import _entries

    asked, recorded = [], []
    first, second = _Stream(asked), _Stream(asked)
    monkeypatch.setattr(_entries, "to_gpu", lambda tensor, device, instead: tensor)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: first)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: recorded.append(stream))
    copied = _entries._Copied(torch.zeros(1), torch.device("cuda", 0))
    assert copied.here() is copied.tensor
    assert asked == recorded == []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: second)
    assert copied.here() is copied.tensor
    assert (asked, recorded) == ([(second, "made")], [second])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    kept = _entries._kept.cache_info().currsize
    assert copied.here() is copied.tensor
    assert len(asked) == 1  # a stream that is captured waits for nothing outside of its graph
    assert _entries._kept.cache_info().currsize == kept + 1
    _entries._kept.cache_clear()


@pytest.mark.parametrize("step", ["adamw", "sgd"])
def test_tables_are_copied_on_the_device_of_the_parameters(step, monkeypatch):
    """Whether a graph is captured is asked of the current device, and streams are its streams."""
    from contextlib import contextmanager
    from importlib import import_module

    module, current = import_module(f"fishkern.kernels.masked_{step}"), []

    @contextmanager
    def device_of(tensor):
        current.append(tensor)
        yield
        current.pop()

    def tables(params, grads, indices):
        assert current == [params[0]]
        return torch.zeros(1), torch.zeros(0), []

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(module, "tables", tables)
    state = [torch.zeros(1)] * (2 if step == "adamw" else 1)
    scalars = dict(beta1=0.9, beta2=0.9, eps=0.0, weight_decay=0.0) if step == "adamw" else {}
    getattr(module, f"masked_{step}_")(
        [torch.zeros(1)], [torch.zeros(1)], [None], *state, torch.ones(1), lr=0.1, **scalars
    )
