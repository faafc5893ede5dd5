"""The model comes back as found, also after an exception: what is set aside for a pass, and put back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_LARGE = 2**20  # entries of a buffer of integers: above, it is a packed weight and no counter
_SIMPLE = (bool, int, float, str, type(None))


@contextmanager
def as_found(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Freeze a model, and put back in the end what running it changes.

    That is ``requires_grad`` and ``.grad`` of its parameters, buffers that move in evaluation mode (counters, running
    means), and tables whose rows torch rescales as they are looked up. What the user has hooked behind the accumulation
    of gradients (an optimizer that steps in backward) rests meanwhile.

    Args:
        model: Without running wrappers.

    Yields:
        A function that puts the buffers back. Called before each run, it lets every example meet the same model.
    """
    states = [_State(module) for module in model.modules() if module._buffers]

    def restore() -> None:
        for state in states:
            state.restore()

    with ExitStack() as stack:
        for entered in (_frozen, _accumulation_hooks_at_rest, _bounded_tables, _norms_in_order):
            stack.enter_context(entered(model))
        stack.callback(restore)
        yield restore


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    found = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _, _ in found:
            parameter.grad = None
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, required, grad in found:
            parameter.requires_grad_(required)
            parameter.grad = grad


@contextmanager
def _accumulation_hooks_at_rest(model: nn.Module) -> Iterator[None]:
    registers = [hooks for parameter in model.parameters() if (hooks := parameter._post_accumulate_grad_hooks)]
    found = [OrderedDict(hooks) for hooks in registers]
    try:
        for hooks in registers:  # emptied and filled again: autograd and the user's handles know these very dicts
            hooks.clear()
        yield
    finally:
        for hooks, kept in zip(registers, found, strict=True):
            hooks.clear()
            hooks.update(kept)


@contextmanager
def _bounded_tables(model: nn.Module) -> Iterator[None]:
    """Put back the tables with ``max_norm``, whose rows torch rescales in place as they are looked up."""
    tables = [module.weight for module in model.modules() if getattr(module, "max_norm", None) is not None]
    kept = [_Kept(table) for table in tables if isinstance(table, Tensor)]
    try:
        yield
    finally:
        for one in kept:
            one.restore()


@contextmanager
def _norms_in_order(model: nn.Module) -> Iterator[None]:
    """Keep ``channels_last`` from two backward passes of torch that do not stand it on a CPU, up to 2.13.

    That of ``GroupNorm``, where the input's gradient is not asked for, reads memory that is not its own and ends the
    process. That of ``InstanceNorm`` gives wrong numbers for a batch of one.
    """

    def in_order(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if args and isinstance(args[0], Tensor) and not args[0].requires_grad and not args[0].is_contiguous():
            return (args[0].contiguous(), *args[1:])
        return None

    def gradient_in_order(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(Tensor.contiguous)

    handles = []
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            handles.append(module.register_forward_pre_hook(in_order))
        elif isinstance(module, nn.modules.instancenorm._InstanceNorm):
            handles.append(module.register_forward_hook(gradient_in_order))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _State:
    """The buffers of one module, with the plain attributes that may say what they hold (the length of a cache)."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._buffers = dict(module._buffers)
        self._kept = [_Kept(buffer) for buffer in self._buffers.values() if buffer is not None and _moves(buffer)]
        self._attributes = {
            name: value for name, value in vars(module).items() if isinstance(value, _SIMPLE) and name != "training"
        }

    def restore(self) -> None:
        register = self._module._buffers
        same = register.keys() == self._buffers.keys() and all(register[n] is b for n, b in self._buffers.items())
        if same and not any(one.has_moved for one in self._kept):
            return
        register.clear()
        register.update(self._buffers)
        vars(self._module).update(self._attributes)
        for one in self._kept:
            one.restore()


class _Kept:
    """A tensor, and a copy of what it held."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._copy = tensor.detach().clone()
        self._version = tensor._version

    @property
    def has_moved(self) -> bool:
        return self._tensor._version != self._version

    @torch.no_grad()
    def restore(self) -> None:
        if self.has_moved:
            self._tensor.copy_(self._copy)
            self._version = self._tensor._version


def _moves(buffer: Tensor) -> bool:
    packed = not buffer.is_floating_point() or buffer.element_size() == 1
    return not buffer.is_inference() and not buffer.is_meta and not (packed and buffer.numel() > _LARGE)
