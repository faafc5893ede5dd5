"""Whether the hub can be reached is known within the time that was given; notes are collected, not lost."""

from __future__ import annotations

import logging
import socket
import threading
import time
import warnings
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

hub_constants = pytest.importorskip("huggingface_hub.constants")

from fishkern.integrations import hub  # noqa: E402


@pytest.fixture
def endpoint(monkeypatch):
    def set_to(address: str) -> None:
        monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub_constants, "ENDPOINT", address)

    return set_to


def test_one_that_answers(endpoint):
    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(404)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.handle_request, daemon=True).start()
    endpoint(f"http://127.0.0.1:{server.server_port}")
    assert hub.unreachable() is None
    server.server_close()


def test_one_that_refuses(endpoint):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    endpoint(address)
    assert "refused" in hub.unreachable()


def test_one_that_never_answers(endpoint):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        endpoint(f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        assert hub.unreachable(timeout=0.3) is not None
        assert time.monotonic() - start < 3


def test_offline_is_told(monkeypatch):
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in hub.unreachable()


def test_warnings_are_collected_once_and_loggers_come_back():
    pytest.importorskip("transformers")
    pytest.importorskip("datasets")
    logger = logging.getLogger("transformers")
    handlers, propagate = logger.handlers[:], logger.propagate
    with hub.quiet() as notes:
        for _ in range(2):
            logging.getLogger("transformers.models").warning("a real\nwarning")
            warnings.warn("mind this", UserWarning, stacklevel=1)
        logging.getLogger("transformers.models").info("chatter")
    assert sorted(notes) == ["UserWarning: mind this", "transformers: a real warning"]
    assert (logger.handlers, logger.propagate) == (handlers, propagate)


@pytest.mark.parametrize("source", ["./none", "/none/at/all", "a/b/c", "~/none", ""])
def test_paths_are_no_ids(source):
    with pytest.raises(FileNotFoundError, match="no folder"):
        hub.locate(source, "model")
