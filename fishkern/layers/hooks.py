"""Hooks on modules that report a call's inputs and the gradient at its output while ordinary autograd runs.

The output of each module passes through an identity that reports its gradient (:mod:`fishkern.layers.tap`). It does not
matter whether the weights require gradients: in ordinary training they get theirs as usual. In a pass with frozen
weights, an extra input that requires a gradient keeps the graph alive, and the weights' gradients are never computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fishkern.layers.base import Call
from fishkern.layers.grads import PerExampleGrads
from fishkern.layers.reentrant import segment
from fishkern.layers.site import Site
from fishkern.layers.tap import FrozenCall, copied, frozen_call, tapped


class Arrival(NamedTuple):
    """A gradient that has arrived at the output of a call.

    Args:
        site: The site that was called.
        call: The call without its tensors.
        saved: The tensors of the call, as its module saw them; empty if the site's rule does not read them.
        grads: Gradient of each floating tensor of the output; ``None`` where none arrived.
        mark: What ``marked`` of the hooks said when the call was made.
        hooks: Where the site runs once more, what :func:`hooks_of_others` listed when the call was made.
    """

    site: Site
    call: FrozenCall
    saved: Sequence[Tensor]
    grads: Sequence[Tensor | None]
    mark: Any = None
    hooks: tuple[int, ...] = ()

    @property
    def thawed(self) -> Call:
        """The call, with its tensors."""
        return self.call.thaw(self.saved)

    @property
    def is_autocast(self) -> bool:
        """Whether autocast is on where the gradient has arrived."""
        return torch.is_autocast_enabled(self.call.autocast[0])

    def without_autocast(self) -> AbstractContextManager:
        """Switch autocast off: a recomputed segment may have turned it on, and a rule would compute in 16 bits."""
        return torch.autocast(self.call.autocast[0], enabled=False) if self.is_autocast else nullcontext()

    def per_example_grads(self) -> Iterator[tuple[str, PerExampleGrads]]:
        """Apply the rule of the site.

        Yields:
            Canonical name and gradients, with each row of the call as an example.
        """
        layer = self.site.layer
        output_grads = self.grads if layer.several else self.grads[0]
        for name, grads in layer.per_example_grads(self.thawed, output_grads, frozenset(self.site.keys)):
            yield self.site.keys[name], grads


class Hooks:
    """Hooks on the modules of some sites, for the duration of a ``with`` block.

    Args:
        sites: The sites to hook.
        arrived: Called during backward with every gradient that arrives.
        on_call: Called with a site and the arguments of each of its calls in a forward pass, but not when activation
            checkpointing repeats the call in backward.
        prepare: Gives for a site a function that changes the output of a call before it is tapped, or ``None``.
        on_output: Gives for a site a function that is called with the output that the model continues with, or
            ``None``.
        marked: Called at every call that is reported; what it returns is the mark of the gradients that arrive there.

    Attributes:
        anchor: A leaf that requires a gradient, on which the output of every tapped call depends.
        active: Whether calls and gradients are reported. If not, the hooks do nothing.
        forward: Whether a forward pass is running, as opposed to checkpointing's recomputation in backward.
    """

    def __init__(
        self,
        sites: Iterable[Site],
        arrived: Callable[[Arrival], None],
        *,
        on_call: Callable[[Site, tuple, Mapping[str, Any]], None] | None = None,
        prepare: Callable[[Site], Callable[[Any], Any] | None] = lambda site: None,
        on_output: Callable[[Site], Callable[[Any], None] | None] = lambda site: None,
        marked: Callable[[], Any] = lambda: None,
    ) -> None:
        self._sites = tuple(sites)
        self._arrived = arrived
        self._on_call = on_call
        self._prepare = prepare
        self._on_output = on_output
        self._marked = marked
        self.anchor = torch.zeros((), requires_grad=True)
        self._entered: dict[Site, list[tuple[tuple, dict[str, Any]]]] = {}
        self._handles: list[Any] = []
        self.active = False
        self.forward = False

    def __enter__(self) -> Hooks:
        for site in self._sites:
            module = site.module
            # next to the module's forward: the user's hooks, outside ours, may change its input and output
            if site.reruns and (module._forward_pre_hooks or site.rewritten):
                enter = self._enter(site)
                self._handles.append(module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True))
            self._handles.append(module.register_forward_hook(self._hook(site), with_kwargs=True, prepend=True))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._entered.clear()

    def begin(self) -> None:
        """Report the calls of a forward pass from here on."""
        self.end()
        self.active = self.forward = True

    def end(self) -> None:
        """Report nothing from here on, and forget the calls that an exception has ended."""
        self.active = self.forward = False
        for calls in self._entered.values():
            calls.clear()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Report the calls of the forward pass inside the ``with`` block."""
        self.begin()
        try:
            yield
        finally:
            self.end()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Report nothing inside the ``with`` block, such as while a module runs once more."""
        self.active, active = False, self.active
        try:
            yield
        finally:
            self.active = active

    def _enter(self, site: Site) -> Callable[..., None]:
        """Note the arguments before the hooks on the input run: a second run of the module runs these hooks again."""
        self._entered[site] = []

        def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if self.active:
                self._entered[site].append(copied((args, kwargs)) if site.rewritten else (args, kwargs))

        return enter

    def _hook(self, site: Site) -> Callable[..., Any]:
        entered = self._entered.get(site)
        prepare, on_output = self._prepare(site), self._on_output(site)

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
            if not self.active:
                return None
            if entered:
                args, kwargs = entered.pop()
            elif site.rewritten and site.reads_input:
                args, kwargs = copied((args, kwargs))
            # A reentrant segment runs its forward pass without gradients. Any other call without them, such as that of
            # a target network, is not a use of the parameter: no gradient will come back from it.
            if self.forward and self._on_call is not None and (torch.is_grad_enabled() or segment()):
                self._on_call(site, args, kwargs)
            if not torch.is_grad_enabled():
                return None
            if prepare is not None:
                output = prepare(output)
            call = frozen_call(module, args, kwargs, keep=site.reads_input)
            mark = self._marked()
            hooks = hooks_of_others(module) if site.reruns else ()

            def receive(saved: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
                self._report(Arrival(site, call, saved, grads, mark, hooks))

            output = tapped(output, self.anchor, receive, call)
            if self.forward and on_output is not None:
                on_output(output)
            return output

        return hook

    def _report(self, arrival: Arrival) -> None:
        if not self.active or all(grad is None for grad in arrival.grads):
            return
        if torch.is_grad_enabled():  # in a backward pass that builds a graph of its own
            with torch.no_grad():
                self._arrived(arrival)
        else:
            self._arrived(arrival)


def hooks_of_others(module: nn.Module) -> tuple[int, ...]:
    """List the hooks on a module and inside it that are not this package's.

    A model may put hooks on its modules for the time of a forward pass (PEFT does, for ``adapter_names``). A module
    that runs once more afterwards then computes something else.

    Args:
        module: The module.

    Returns:
        Their numbers, each of which torch gives once.
    """
    registers = (hooks for one in module.modules() for hooks in (one._forward_pre_hooks, one._forward_hooks))
    return tuple(
        number
        for hooks in registers
        for number, hook in hooks.items()
        if not str(getattr(hook, "__module__", "")).startswith("fishkern.")
    )
