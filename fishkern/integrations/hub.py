"""Ids and folders: what lies here, what the hub would have to bring, and whether it can be reached."""

from __future__ import annotations

import logging
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch

_LIBRARIES = ("transformers", "datasets", "peft", "huggingface_hub", "accelerate")
# What is said better elsewhere: weights that were missing are announced by name.
_SAID_ELSEWHERE = re.compile(r"LOAD REPORT|newly initialized|thrown while requesting|^Retrying in")


def unreachable(timeout: float = 3.0) -> str | None:
    """Say what keeps the hub from being reached; the libraries' own attempts take half a minute to fail.

    Args:
        timeout: Seconds after which it counts as unreachable, also where the name server hangs.

    Returns:
        The reason in words, or ``None`` when it answers.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    answer: list[str | None] = [f"{constants.ENDPOINT} does not answer within {timeout:g} s"]

    def ask() -> None:
        try:
            urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=timeout).close()
            answer[0] = None
        except HTTPError:
            answer[0] = None  # it speaks
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            answer[0] = f"{constants.ENDPOINT}: {getattr(reason, 'strerror', None) or reason}"

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    return answer[0]


def locate(source: str, what: str) -> tuple[str, str | None]:
    """Tell a folder of this machine from an id on the hub.

    Args:
        source: As the user gave it.
        what: For messages: ``"model"``, ``"tokenizer"``.

    Returns:
        The folder or the id, and why the hub cannot be asked: then only what lies on this machine can be had.

    Raises:
        FileNotFoundError: It is neither a folder nor of the form of an id.
        NotADirectoryError: It is a file.
    """
    path = Path(source).expanduser()
    if source and path.is_dir():
        return str(path), "it is a folder"
    if path.is_file():
        raise NotADirectoryError(f"{source} is a file: a {what} is a folder, or an id on the hub.")
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source):
        raise FileNotFoundError(f"there is no folder {source}: a {what} is a folder, or an id on the hub.")
    return source, unreachable()


@contextmanager
def explained(source: str, what: str, reason: str | None, advice: str = "") -> Iterator[None]:
    """Turn what the libraries raise while they load something into one line.

    Args:
        source: What is loaded.
        what: ``"model"``, ``"tokenizer"``.
        reason: Why the hub is not asked, from :func:`locate`.
        advice: What to do, instead of the library's own words.

    Yields:
        Nothing.

    Raises:
        FileNotFoundError: It is not there.
        ValueError: It is there and cannot be used.
    """  # noqa: DOC501 - what is raised again is not its own
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # each file format and each library raises its own
        if reason is not None and not Path(source).is_dir():
            raise FileNotFoundError(
                f"there is no folder {source} here, no {what} of that id in the cache, and the hub cannot be asked "
                f"({reason})."
            ) from error
        why = advice or re.split(r"(?<=[.!?])\s", " ".join(str(error).split()))[0]
        raise ValueError(f"no {what} can be loaded from {source}: {why}") from error


@contextmanager
def quiet(downloads: bool = False) -> Iterator[list[str]]:
    """Keep the libraries' progress bars and reports out of the way, and collect what they warn of.

    Args:
        downloads: Whether the bars of downloads from the hub stay.

    Yields:
        The warnings in one line each, every one once; complete when the block has ended.
    """
    import datasets
    import huggingface_hub.utils as hub
    from transformers.utils import logging as transformers_logging

    collected: dict[str, None] = {}

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            add(record.name.partition(".")[0], record.getMessage())

    def add(source: str, message: str) -> None:
        message = " ".join(message.split())
        if not _SAID_ELSEWHERE.search(message):
            collected[f"{source}: {message}"] = None

    loggers = [logging.getLogger(name) for name in _LIBRARIES]
    found = [(logger, logger.handlers[:], logger.propagate) for logger in loggers]
    bars = transformers_logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()
    hub_bars = hub.are_progress_bars_disabled()
    notes: list[str] = []
    try:
        transformers_logging.disable_progress_bar()
        datasets.disable_progress_bars()
        if not downloads:
            hub.disable_progress_bars()
        for logger in loggers:
            logger.handlers, logger.propagate = [Collector(logging.WARNING)], False
        with warnings.catch_warnings(record=True) as caught:
            yield notes
        for warning in caught:
            if not issubclass(warning.category, DeprecationWarning | PendingDeprecationWarning | FutureWarning):
                add(warning.category.__name__, str(warning.message))
    finally:
        for logger, handlers, propagate in found:
            logger.handlers, logger.propagate = handlers, propagate
        if bars[0]:
            transformers_logging.enable_progress_bar()
        if not bars[1]:
            datasets.enable_progress_bars()
        if not hub_bars:
            hub.enable_progress_bars()
        notes.extend(collected)
