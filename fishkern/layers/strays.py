"""Strays: calls that the survey did not see, and whose gradients a plan would therefore miss.

For the generic path the survey picks a host that was running at every call of the inner module. A later batch may call
that module from outside its host. Or it may call a module for the first time that shares a parameter with others.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fishkern.layers.reentrant import segment
from fishkern.layers.site import Idle, Site


class Strays:
    """Watch the modules that the generic path reaches through a host around them, and those that were idle.

    Args:
        sites: The sites of the pass.
        idle: Modules that share a parameter with them, and were not called in the survey.

    Attributes:
        reasons: For each parameter with a stray call, the reason in words why it needs the loop, by canonical name.
    """

    def __init__(self, sites: Sequence[Site], idle: Sequence[Idle]) -> None:
        self.reasons: dict[str, str] = {}
        self._idle = tuple(idle)
        self._running: Counter[nn.Module] = Counter()
        self._hosts: dict[nn.Module, dict[nn.Module, list[tuple[str, str]]]] = defaultdict(lambda: defaultdict(list))
        for site in sites:
            if site.layer is None:
                for name, key in site.keys.items():
                    inner = site.module.get_submodule(name.rpartition(".")[0])
                    if inner is not site.module:
                        self._hosts[site.module][inner].append((key, site.path))

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch the forward pass inside the ``with`` block.

        Yields:
            Nothing.
        """
        self._running.clear()
        handles = [one.module.register_forward_pre_hook(self._noting_idle(one)) for one in self._idle]
        for host, inside in self._hosts.items():
            handles.append(host.register_forward_pre_hook(self._enter, prepend=True))
            handles.append(host.register_forward_hook(self._leave, always_call=True))
            for inner, keys in inside.items():
                handles.append(inner.register_forward_pre_hook(self._noting(host, keys)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._running[module] += 1

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running[module] -= 1

    def _noting(self, host: nn.Module, keys: list[tuple[str, str]]) -> Callable[[nn.Module, Any], None]:
        def note(module: nn.Module, args: Any) -> None:
            if not self._running[host]:
                self.reasons |= {key: f"its module is also called outside of {path}" for key, path in keys}

        return note

    def _noting_idle(self, idle: Idle) -> Callable[[nn.Module, Any], None]:
        def note(module: nn.Module, args: Any) -> None:
            if torch.is_grad_enabled() or segment():  # without gradients it is no use of the parameter
                self.reasons[idle.key] = f"{idle.path} shares it, and the first examples did not call that module"

        return note
