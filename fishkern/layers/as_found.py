"""Leave a model as found, also after an exception: state that a pass changes is saved before it and restored after."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fishkern import hosts

_LARGE = 2**20  # an integer buffer with more entries is a packed weight, not a counter: it is not copied
_SIMPLE = (bool, int, float, str, type(None))


@contextmanager
def as_found(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Freeze a model, and restore at the end everything that running it changes.

    That is ``requires_grad`` and ``.grad`` of its parameters, buffers that change in evaluation mode (counters, running
    means), and embedding tables whose rows torch rescales when they are looked up. The user's hooks that run after a
    gradient is accumulated (an optimizer that steps in backward) are switched off meanwhile.

    Args:
        model: Without running wrappers.

    Yields:
        A function that restores the buffers. Called before each run, it makes every example see the same model.
    """
    states = [_State(module) for module in model.modules() if module._buffers]

    def restore() -> None:
        for state in states:
            state.restore()

    with ExitStack() as stack:
        for manager in (_frozen, _accumulation_hooks_off, _bounded_tables, _contiguous_norms):
            stack.enter_context(manager(model))
        stack.callback(restore)
        yield restore


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    states = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _, _ in states:
            parameter.grad = None
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, required, grad in states:
            parameter.requires_grad_(required)
            parameter.grad = grad


@contextmanager
def _accumulation_hooks_off(model: nn.Module) -> Iterator[None]:
    registers = [hooks for parameter in model.parameters() if (hooks := parameter._post_accumulate_grad_hooks)]
    copies = [OrderedDict(hooks) for hooks in registers]
    try:
        for hooks in registers:  # emptied, not replaced: autograd and the user's handles refer to these very dicts
            for number in [number for number, hook in hooks.items() if not hosts.completes_gradient(hook)]:
                del hooks[number]
        yield
    finally:
        for hooks, copied in zip(registers, copies, strict=True):
            hooks.clear()
            hooks.update(copied)


@contextmanager
def _bounded_tables(model: nn.Module) -> Iterator[None]:
    """Restore embedding tables with ``max_norm``, whose rows torch rescales in place when they are looked up."""
    tables = [module.weight for module in model.modules() if getattr(module, "max_norm", None) is not None]
    snapshots = [_Snapshot(table) for table in tables if isinstance(table, Tensor)]
    try:
        yield
    finally:
        for snapshot in snapshots:
            snapshot.restore()


@contextmanager
def _contiguous_norms(model: nn.Module) -> Iterator[None]:
    """Work around two faults of torch's backward passes with ``channels_last`` on a CPU (up to torch 2.13).

    That of ``GroupNorm`` reads memory out of bounds and ends the process if its input requires no gradient. That of
    ``InstanceNorm`` gives wrong numbers for a batch of one.
    """

    def contiguous_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if args and isinstance(args[0], Tensor) and not args[0].requires_grad and not args[0].is_contiguous():
            return (args[0].contiguous(), *args[1:])
        return None

    def contiguous_gradient(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(Tensor.contiguous)

    handles = []
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            handles.append(module.register_forward_pre_hook(contiguous_input))
        elif isinstance(module, nn.modules.instancenorm._InstanceNorm):
            handles.append(module.register_forward_hook(contiguous_gradient))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _State:
    """The buffers of one module, with the plain attributes that may describe them (such as the length of a cache)."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._buffers = dict(module._buffers)
        self._snapshots = [_Snapshot(one) for one in self._buffers.values() if one is not None and _may_change(one)]
        self._attributes = {
            name: value for name, value in vars(module).items() if isinstance(value, _SIMPLE) and name != "training"
        }

    def restore(self) -> None:
        register = self._module._buffers
        same = register.keys() == self._buffers.keys() and all(register[n] is b for n, b in self._buffers.items())
        if same and not any(snapshot.is_stale for snapshot in self._snapshots):
            return
        register.clear()  # a model may also have added, removed or replaced buffers
        register.update(self._buffers)
        vars(self._module).update(self._attributes)
        for snapshot in self._snapshots:
            snapshot.restore()


class _Snapshot:
    """A tensor, and a copy of its values."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._copy = tensor.detach().clone()
        self._version = tensor._version

    @property
    def is_stale(self) -> bool:
        return self._tensor._version != self._version

    @torch.no_grad()
    def restore(self) -> None:
        if self.is_stale:
            self._tensor.copy_(self._copy)
            self._version = self._tensor._version


def _may_change(buffer: Tensor) -> bool:
    packed = not buffer.is_floating_point() or buffer.element_size() == 1
    return not buffer.is_inference() and not buffer.is_meta and not (packed and buffer.numel() > _LARGE)
