"""What happens at a model's modules while it runs on two examples, or one, each one's loss back-propagated alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fishkern.layers.tap import FrozenCall, frozen_call, rows_and_length, tapped


@dataclass
class Seen:
    """What was seen of one module.

    Args:
        calls: Each call, with its tensors, and its output.
        touched: For each output gradient: the call, the example whose loss it is of, the number of rows, and the rows
            that are not zero.
        lengths: For each call ``T`` of the enclosing module's input ``[N, T, ...]``, where there is one.
        block: That module.
    """

    calls: list[tuple[FrozenCall, Any]] = field(default_factory=list)
    touched: list[tuple[int, int, int | None, Tensor]] = field(default_factory=list)
    lengths: list[int | None] = field(default_factory=list)
    block: nn.Module | None = None

    @property
    def with_gradient(self) -> set[int]:
        """Calls that a gradient reached."""
        return {call for call, _, _, _ in self.touched}


class _Observer:
    """Hooks that record calls and the rows of their output gradients."""

    def __init__(
        self, model: nn.Module, observed: Mapping[str, nn.Module], shared: frozenset[nn.Module], num_examples: int
    ) -> None:
        self._num_examples = num_examples
        self.seen: dict[nn.Module, Seen] = defaultdict(Seen)
        self._paths = {module: path for path, module in observed.items()}
        self._modules = dict(model.named_modules())
        self.shared = shared
        self._inputs: dict[nn.Module, tuple[int, int] | None] = {}
        self._anchor = torch.zeros((), requires_grad=True)
        self._example = 0

    @contextmanager
    def hooked(self) -> Iterator[None]:
        handles = []
        for module in set(self._modules.values()):
            handles.append(module.register_forward_pre_hook(self._note_input, with_kwargs=True))
        for module in self._paths:
            handles.append(module.register_forward_hook(self._hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def backward(self, losses: Tensor) -> None:
        with self.hooked():  # for what is recomputed
            count = self._num_examples if losses.requires_grad else 0
            for self._example in range(count):
                losses[self._example].backward(retain_graph=self._example < count - 1)

    def _note_input(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._inputs[module] = rows_and_length((args, kwargs))

    def _hook(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        if not torch.is_grad_enabled():
            return None
        if module in self.shared and isinstance(output, Tensor):
            output = output.expand(self._num_examples, *output.shape[1:])
        seen = self.seen[module]
        index = len(seen.calls)
        call = frozen_call(module, args, kwargs)
        seen.block, length = self._enclosing(self._paths[module])
        seen.lengths.append(length)
        seen.calls.append((replace(call, tensors=list(call.tensors)), _detached(output)))
        call.tensors.clear()  # recorded above; autograd need not keep them

        def receive(_: Any, grads: tuple[Tensor | None, ...]) -> None:
            for grad in grads:
                if grad is not None:
                    rows = grad.ne(0).unsqueeze(-1).flatten(1).any(1) if grad.ndim else grad.new_zeros(0)
                    seen.touched.append((index, self._example, grad.shape[0] if grad.ndim else None, rows.nonzero()))

        return tapped(output, self._anchor, receive, call)

    def _enclosing(self, path: str) -> tuple[nn.Module | None, int | None]:
        """Find the nearest enclosing module whose input is ``[N, T, ...]``, and ``T``."""
        while path:
            path = path.rpartition(".")[0]
            module = self._modules[path]
            rows, length = self._inputs.get(module) or (None, None)
            if rows == self._num_examples:
                return module, length
        return None, None


def observe(
    model: nn.Module, owners: Mapping[str, Mapping[str, str]], losses: Callable[[], Tensor], num_examples: int
) -> dict[nn.Module, Seen]:
    """Run the model on a few examples, back-propagate the loss of each alone, and record what happens at its modules.

    An output shared by all examples (leading size 1) is expanded where that changes no loss.

    Args:
        model: The model, its weights frozen.
        owners: Paths of the modules that own parameters asked for.
        losses: Runs the model and returns the losses.
        num_examples: 2, or 1.

    Returns:
        What was seen of each owner, and of each module around one, that was called.
    """
    modules = dict(model.named_modules())
    observed = {path: modules[path] for owner in owners for path in upwards(owner) if path or owner == ""}
    owning = {modules[path] for path in owners}

    def run(shared: frozenset[nn.Module]) -> tuple[_Observer, Tensor]:
        observer = _Observer(model, observed, shared, num_examples)
        with observer.hooked():
            return observer, losses()

    def of_all_examples(observer: _Observer) -> frozenset[nn.Module]:
        return frozenset(
            module
            for module, seen in observer.seen.items()
            if module in owning and all(isinstance(output, Tensor) and output.ndim > 1 and output.shape[0] == 1
                                        for _, output in seen.calls)
        )  # fmt: skip

    observer, values = run(frozenset())
    found = of_all_examples(observer) if num_examples > 1 else frozenset()
    if found:
        expected = values.detach()
        del observer, values  # and the activations that they keep
        observer, values = _expanded(run, frozenset(), found, expected)
    observer.backward(values)
    late = of_all_examples(observer) - found if num_examples > 1 else ()
    if late:  # what only the recomputation of a checkpoint shows
        observer, values = _expanded(run, observer.shared, late, values.detach())
        observer.backward(values)
    return observer.seen


def _expanded(
    run: Callable[..., tuple[_Observer, Tensor]],
    shared: frozenset[nn.Module],
    candidates: frozenset[nn.Module],
    expected: Tensor,
) -> tuple[_Observer, Tensor]:
    """Run with those shared outputs expanded that change no loss: all of the candidates, or some, or none."""
    if found := _same_losses(run, shared | candidates, expected):
        return found
    alone = candidates if len(candidates) > 1 else ()
    return run(shared | {module for module in alone if _same_losses(run, shared | {module}, expected)})


def _same_losses(
    run: Callable[..., tuple[_Observer, Tensor]], shared: frozenset[nn.Module], expected: Tensor
) -> tuple[_Observer, Tensor] | None:
    try:
        observer, values = run(shared)
    except Exception:  # whatever the model or the loss says to it: they need the axis to be 1
        return None
    same = torch.allclose(values, expected, rtol=64 * torch.finfo(expected.dtype).eps, atol=0.0)
    return (observer, values) if same else None


def _detached(output: Any) -> Any:
    leaves, spec = tree_flatten(output)
    return tree_unflatten([leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)


def upwards(path: str) -> Iterator[str]:
    """Walk from a module to the whole model.

    Args:
        path: Name of the module.

    Yields:
        Its name and those of the modules around it, the whole model (``""``) last.
    """
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""
