"""A base of values that do not change once they are made."""

from __future__ import annotations

from typing import NoReturn


class Frozen:
    """Refuses to set and delete attributes; ``__init__`` writes them by ``vars(self).update``."""

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"{type(self).__name__} is frozen: {name} cannot be set.")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"{type(self).__name__} is frozen: {name} cannot be deleted.")
