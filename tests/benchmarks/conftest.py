from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable
from itertools import count

import pytest

NAMES = count()


@pytest.fixture
def plant(monkeypatch, tmp_path) -> Callable[..., str]:
    """Write cases, given as texts by name, into a package; gives its name. A later call changes cases of it."""
    package = f"planted{next(NAMES)}"
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def write(**files: str) -> str:
        for name, text in files.items():
            (tmp_path / package / f"{name}.py").write_text(textwrap.dedent(text))
            sys.modules.pop(f"{package}.{name}", None)
        return package

    return write
