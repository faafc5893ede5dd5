"""Folders on this machine and ids on the hub: which one a name is, whether the hub answers, how to load quietly."""

from __future__ import annotations

import logging
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch

_LIBRARIES = ("transformers", "datasets", "peft", "huggingface_hub", "accelerate")
# Weights that a checkpoint lacks are announced by name elsewhere; the rest is about retries.
_SAID_ELSEWHERE = re.compile(r"LOAD REPORT|newly initialized|thrown while requesting|^Retrying in")


def unreachable(timeout: float = 3.0) -> str | None:
    """Say why the hub cannot be reached; the libraries' own attempts take half a minute to fail.

    Args:
        timeout: Seconds after which it counts as unreachable, even if only the name server hangs.

    Returns:
        The reason in words, or ``None`` if it answers.
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
            answer[0] = None  # an error is an answer, too
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            answer[0] = f"{constants.ENDPOINT}: {getattr(reason, 'strerror', None) or reason}"

    thread = threading.Thread(target=ask, daemon=True)  # the time limit of urlopen does not cover the name server
    thread.start()
    thread.join(timeout)
    return answer[0]


def locate(source: str, what: str) -> tuple[str, str | None]:
    """Tell a folder of this machine from an id on the hub.

    Args:
        source: What the user named.
        what: For messages: ``"model"``, ``"tokenizer"``.

    Returns:
        The folder or the id; and the reason not to ask the hub, or ``None``.

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
    """Turn the libraries' many errors of loading into one line.

    Args:
        source: The folder or id.
        what: ``"model"``, ``"tokenizer"``.
        reason: Why the hub is not asked, from :func:`locate`.
        advice: What to do, instead of the library's own words.

    Yields:
        Nothing.

    Raises:
        FileNotFoundError: It does not exist.
        ValueError: It exists and cannot be used.
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
def quiet() -> Iterator[list[str]]:
    """Switch off the libraries' progress bars and reports, and collect their warnings.

    Yields:
        The warnings in one line each, every one once; complete when the block has ended.
    """
    collected: dict[str, None] = {}

    def add(source: str, message: str) -> None:
        message = " ".join(message.split())
        if not _SAID_ELSEWHERE.search(message):
            collected[f"{source}: {message}"] = None

    notes: list[str] = []
    try:
        with _without_bars(), _logging_to(add), warnings.catch_warnings(record=True) as caught:
            yield notes
        for warning in caught:
            if not issubclass(warning.category, DeprecationWarning | PendingDeprecationWarning | FutureWarning):
                add(warning.category.__name__, str(warning.message))
    finally:
        notes.extend(collected)


@contextmanager
def _without_bars() -> Iterator[None]:
    import datasets
    import huggingface_hub.utils as hub
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    hidden, hub_hidden = datasets.are_progress_bars_disabled(), hub.are_progress_bars_disabled()
    try:
        transformers_logging.disable_progress_bar()
        datasets.disable_progress_bars()
        hub.disable_progress_bars()
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
        if not hidden:
            datasets.enable_progress_bars()
        if not hub_hidden:
            hub.enable_progress_bars()


class _Collector(logging.Handler):
    """Hands every warning to a function of its library and its text."""

    def __init__(self, add: Callable[[str, str], None]) -> None:
        super().__init__(logging.WARNING)
        self._add = add

    def emit(self, record: logging.LogRecord) -> None:
        self._add(record.name.partition(".")[0], record.getMessage())


@contextmanager
def _logging_to(add: Callable[[str, str], None]) -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in _LIBRARIES]
    settings = [(logger, logger.handlers[:], logger.propagate) for logger in loggers]
    try:
        for logger in loggers:
            logger.handlers, logger.propagate = [_Collector(add)], False
        yield
    finally:
        for logger, handlers, propagate in settings:
            logger.handlers, logger.propagate = handlers, propagate
