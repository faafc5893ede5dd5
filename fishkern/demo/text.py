"""The text of the demo, all of it inside every Python: documentation to train on, and source to tune on."""

from __future__ import annotations

import ast
import re
import sysconfig
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

HELD_OUT = 8  # every 8th paragraph, or file, is kept from training
SHORTEST, LONGEST = 16, 64  # bytes of such a paragraph; longer ones are cut
FILES = 40  # of Python source


def read_text() -> tuple[bytes, list[Tensor]]:
    """Read the help topics of ``pydoc`` and the docstrings of the standard library.

    Returns:
        The text to train on, and the held-out paragraphs: byte values ``[T]``, ``SHORTEST <= T <= LONGEST``.
    """
    paragraphs = dict.fromkeys(
        paragraph.strip().encode() for text in _texts() for paragraph in re.split(r"\n\s*\n", text)
    )  # each once: the topics repeat one another
    training = [paragraph for n, paragraph in enumerate(paragraphs) if n % HELD_OUT]
    others = [paragraph[:LONGEST] for paragraph in islice(paragraphs, 0, None, HELD_OUT) if len(paragraph) >= SHORTEST]
    return b"\n\n".join(training), [torch.tensor(list(paragraph)) for paragraph in others]


def read_code() -> tuple[Tensor, Tensor]:
    """Read source of the standard library, which a model of its documentation has not seen.

    Returns:
        Byte values to train on, and those of other files: ``[S]`` each.
    """
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"), key=lambda path: (len(path.name), path.name))
    sources = [path.read_bytes() for path in paths[:FILES]]
    training = [source for n, source in enumerate(sources) if n % HELD_OUT]
    return _joined(training), _joined(sources[::HELD_OUT])


def _texts() -> Iterator[str]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name]
    documented = ast.Module | ast.ClassDef | ast.FunctionDef
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):  # parsed, not imported; none in some builds
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, documented) and (text := ast.get_docstring(node)):
                yield text


def _joined(sources: list[bytes]) -> Tensor:
    return torch.frombuffer(bytearray(b"\n".join(sources)), dtype=torch.uint8).long()
