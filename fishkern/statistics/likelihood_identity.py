"""Which likelihood a call has, in a text that is another one where its losses may be others."""

from __future__ import annotations

import dis
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import partial
from hashlib import blake2b
from types import CodeType, FunctionType, MethodType
from typing import Any

from fishkern.statistics.contents import bytes_of, is_array, is_single
from fishkern.statistics.likelihood_argument import name_of_function

_WRITES = ("STORE_GLOBAL", "STORE_DEREF")


def identity_of(likelihood: Any) -> str:
    """Identify a likelihood.

    Of a function this is a digest of its code and of the plain values, tensors and functions of its own module that it
    refers to; what other objects do is not looked into.

    Args:
        likelihood: As for :func:`fishkern.estimate`.

    Returns:
        The name of its class with all options; a function's name with the digest.
    """
    if is_dataclass(likelihood):
        options = ", ".join(f"{one.name}={identity_of(getattr(likelihood, one.name))}" for one in fields(likelihood))
        return f"{type(likelihood).__name__}({options})"
    if not callable(likelihood) and not is_array(likelihood):
        return repr(likelihood)
    hashed = blake2b(digest_size=8)
    for piece in _pieces(likelihood, set()):
        hashed.update(piece)
    if is_array(likelihood):
        return f"values {hashed.hexdigest()}"
    return f"function {name_of_function(likelihood)} with the code {hashed.hexdigest()}"


def _pieces(value: Any, met: set[int]) -> Iterator[bytes]:
    """Give bytes that say what a function does, or what a value is that it refers to."""
    if id(value) in met:
        return
    if isinstance(value, FunctionType):
        met.add(id(value))
        written = {one.argval for one in dis.get_instructions(value) if one.opname in _WRITES}  # counters
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        inner = {name: _content(cell) for name, cell in cells if name not in written}
        options = (value.__defaults__ or (), value.__kwdefaults__ or {})
        parts = [*_code(value.__code__), *inner.values(), *options[0], *options[1].values()]
        parts += [one for name, one in _globals(value) if name not in written]
        for part in parts:
            yield from _pieces(part, met)
    elif isinstance(value, partial):
        for part in (value.func, *value.args, *value.keywords, *value.keywords.values()):
            yield from _pieces(part, met)
    elif isinstance(value, MethodType):
        yield from _pieces(value.__func__, met)
    elif None not in (known := list(bytes_of(value))):
        yield from known
    else:
        yield from _pieces(getattr(value, "__wrapped__", None), met)  # as functools.cache has it
        kind = type(value)
        yield f"{kind.__module__}.{kind.__qualname__}".encode()
        if isinstance(call := getattr(kind, "__call__", None), FunctionType):  # noqa: B004
            yield from _pieces(call, met)


def _code(code: CodeType) -> Iterator[Any]:
    """Give what a function's code consists of, with that of functions inside."""
    yield code.co_code
    yield code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code(constant)
        else:
            yield repr(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant)


def _globals(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Give the plain values and the functions of its own module that a function refers to by name."""
    names = {name for part in _code(function.__code__) if isinstance(part, tuple) for name in part}
    for name in sorted(names & function.__globals__.keys()):
        value = function.__globals__[name]
        is_own = isinstance(value, FunctionType) and value.__module__ == function.__module__
        if is_single(value) or is_own:
            yield name, value


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet assigned
        return None
