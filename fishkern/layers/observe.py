"""What happens at a model's modules while it runs on two examples, or one, each one's loss back-propagated alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fishkern.layers.reentrant import segment, stays
from fishkern.layers.tap import FrozenCall, copied, frozen_call, rows_and_length, tapped


@dataclass
class Seen:
    """What was seen of one module.

    Args:
        calls: Each call, with its tensors, and its output.
        touched: For each output gradient: the call, the example whose loss it is of, the number of rows, and the rows
            that are not zero.
        columns: For each output gradient ``[T, N, ...]``: the example whose loss it is of, and the columns that are not
            zero; ``None`` for one of another shape.
        lengths: For each call ``T`` of the enclosing module's input ``[N, T, ...]``, where there is one.
        block: That module.
        entered: For each call, the same with its tensors as they are ahead of the hooks on its input.
        versions: For each call, how often its tensors of ``entered`` and its output had been written into.
        was_rewritten: Whether copies have taken the place of an input that the model writes into.
        writes_input: Whether the module itself writes into its input: what others hold of it bypasses any tap.
        untapped: Whether it was called inside a transform of ``torch.func`` (``vmap``, ``grad``) or returned a nested
            tensor, where rows are no rows of the batch or cannot be told. Such calls are not among ``calls``.
    """

    calls: list[tuple[FrozenCall, Any]] = field(default_factory=list)
    touched: list[tuple[int, int, int | None, Tensor]] = field(default_factory=list)
    columns: list[tuple[int, Tensor] | None] = field(default_factory=list)
    lengths: list[int | None] = field(default_factory=list)
    block: nn.Module | None = None
    entered: list[FrozenCall] = field(default_factory=list)
    versions: list[tuple[list[int], list[int]]] = field(default_factory=list)
    was_rewritten: bool = False
    writes_input: bool = False
    untapped: bool = False

    @property
    def with_gradient(self) -> set[int]:
        """Calls that a gradient reached."""
        return {call for call, _, _, _ in self.touched}

    @property
    def input_rewritten(self) -> bool:
        """Whether the model has written into an input of a call, while the module ran or afterwards."""
        calls = zip(self.entered, self.versions, strict=True)
        return self.was_rewritten or any(_versions(call.tensors) != before for call, (before, _) in calls)

    @property
    def output_rewritten(self) -> bool:
        """Whether the model has written into an output, as an activation in place does."""
        calls = zip(self.calls, self.versions, strict=True)
        return any(_versions(_tensors(output)) != before for (_, output), (_, before) in calls)


@dataclass
class Observation:
    """What was seen of a model.

    Args:
        seen: Of each module that owns parameters asked for, or is around one, and was called.
        around: For each of these modules, those that were running at every one of its calls, itself included.
        checkpointing: Modules around segments under reentrant checkpointing.
        again: Runs the model once more and keeps copies of what goes into and comes out of some modules.
    """

    seen: dict[nn.Module, Seen]
    around: dict[nn.Module, set[nn.Module]]
    checkpointing: set[nn.Module]
    again: Callable[[frozenset[nn.Module]], dict[nn.Module, Seen]]

    def copy(self, modules: Collection[nn.Module]) -> None:
        """Replace what was kept of modules into whose memory the model has written since, by copies.

        Args:
            modules: Which; the model runs once more.
        """
        for module, copies in self.again(frozenset(modules)).items():
            seen = self.seen[module]
            if len(copies.calls) == len(seen.calls) == 1:
                seen.was_rewritten = seen.input_rewritten
                seen.calls, seen.entered = copies.calls, copies.entered
                seen.versions = [(_versions(call.tensors), _versions(_tensors(out))) for call, out in seen.calls]


@dataclass(frozen=True)
class _Running:
    """A call that has not ended: what it got, how often that had been written into, and whether in grad mode."""

    module: nn.Module
    given: tuple[tuple, dict[str, Any]]
    versions: list[int]
    with_grad: bool


class _Observer:
    """Hooks that record calls and the rows of their output gradients."""

    def __init__(
        self,
        model: nn.Module,
        observed: Mapping[str, nn.Module],
        shared: frozenset[nn.Module],
        num_examples: int,
        copying: frozenset[nn.Module] = frozenset(),
    ) -> None:
        self._num_examples = num_examples
        self.seen: dict[nn.Module, Seen] = defaultdict(Seen)
        self.around: dict[nn.Module, set[nn.Module]] = {}
        self.checkpointing: set[nn.Module] = set()
        self._paths = {module: path for path, module in observed.items()}
        self._modules = dict(model.named_modules())
        self.shared = shared
        self._copying = copying
        self._running: list[_Running] = []
        self._recomputes = False
        self._inputs: dict[nn.Module, tuple[int, int] | None] = {}
        self._anchor = torch.zeros((), requires_grad=True)
        self._example = 0

    @contextmanager
    def hooked(self) -> Iterator[None]:
        handles = []
        # next to the module's forward, or ahead of all, so that hooks of the user change nothing in between
        for module in set(self._modules.values()):
            handles.append(module.register_forward_pre_hook(self._note_input, with_kwargs=True, prepend=True))
        for module in self._paths:
            handles.append(module.register_forward_hook(self._hook, with_kwargs=True, prepend=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def backward(self, losses: Tensor) -> None:
        self._recomputes = True
        with self.hooked():  # for what is recomputed
            count = self._num_examples if losses.requires_grad else 0
            for self._example in range(count):
                losses[self._example].backward(retain_graph=self._example < count - 1)

    def _note_input(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._inputs[module] = rows_and_length((args, kwargs))
        if module in self._paths:
            given = copied((args, kwargs)) if module in self._copying else (args, kwargs)
            self._running.append(_Running(module, given, _versions(_tensors(given)), torch.is_grad_enabled()))

    def _ended(self, module: nn.Module) -> _Running:
        """Take a module off those that run."""
        while True:  # what stopped half-way, as the recomputation of a checkpoint does, lies above it
            if (ended := self._running.pop()).module is module:
                return ended

    def _hook(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        running = {one.module for one in self._running}
        inside = None if torch.is_grad_enabled() else segment()
        if not self._recomputes and (inside or torch.is_grad_enabled()):
            self.around[module] = running & self.around.get(module, running)
        if inside and stays(inside):
            self.checkpointing |= {one.module for one in self._running if one.with_grad}
        entered = self._ended(module)
        if torch._C._are_functorch_transforms_active() or any(leaf.is_nested for leaf in _tensors(output)):
            self.seen[module].untapped = True
            return None
        if not torch.is_grad_enabled() and module not in self._copying:
            return None
        if module in self.shared and isinstance(output, Tensor):
            output = output.expand(self._num_examples, *output.shape[1:])
        seen = self.seen[module]
        index = len(seen.calls)
        seen.block, length = self._enclosing(self._paths[module])
        seen.lengths.append(length)
        seen.entered.append(frozen_call(module, *entered.given))
        if module in self._copying:
            seen.calls.append((seen.entered[-1], copied(output)))
            return None
        seen.calls.append((frozen_call(module, args, kwargs), _detached(output)))
        seen.writes_input |= _versions(seen.entered[-1].tensors) != entered.versions
        seen.versions.append((entered.versions, _versions(_tensors(output))))

        def receive(_: Any, grads: tuple[Tensor | None, ...]) -> None:
            for grad in grads:
                if grad is not None:
                    rows = grad.ne(0).unsqueeze(-1).flatten(1).any(1) if grad.ndim else grad.new_zeros(0)
                    seen.touched.append((index, self._example, grad.shape[0] if grad.ndim else None, rows.nonzero()))
                    second = grad.ndim > 2 and grad.shape[1] == self._num_examples > 1
                    columns = grad.ne(0).transpose(0, 1).flatten(1).any(1).nonzero() if second else None
                    seen.columns.append(None if columns is None else (self._example, columns))

        # recorded above; autograd need not keep its tensors
        return tapped(output, self._anchor, receive, frozen_call(module, (), {}))

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
    model: nn.Module,
    owners: Mapping[str, Mapping[str, str]],
    losses: Callable[[], Tensor],
    answered: Callable[[Callable[[], Any]], Any],
    num_examples: int,
) -> Observation:
    """Run the model on a few examples, back-propagate the loss of each alone, and record what happens at its modules.

    An output shared by all examples (leading size 1) is expanded where that changes no loss.

    Args:
        model: The model, its weights frozen.
        owners: Paths of the modules that own parameters asked for.
        losses: Runs the model and returns the losses.
        answered: Runs a run, once more where segments of the model are cut off
            (:meth:`fishkern.layers.reentrant.Connection.answered`).
        num_examples: 2, or 1.

    Returns:
        What was seen.
    """
    modules = dict(model.named_modules())
    observed = {path: modules[path] for owner in owners for path in upwards(owner) if path or owner == ""}
    owning = {modules[path] for path in owners}

    def run(shared: frozenset[nn.Module], copying: frozenset[nn.Module] = frozenset()) -> tuple[_Observer, Tensor]:
        observer = _Observer(model, observed, shared, num_examples, copying)
        with observer.hooked():
            return observer, losses()

    def of_all_examples(observer: _Observer) -> frozenset[nn.Module]:
        return frozenset(
            module
            for module, seen in observer.seen.items()
            if module in owning and seen.calls
            and all(isinstance(output, Tensor) and output.ndim > 1 and output.shape[0] == 1 for _, output in seen.calls)
        )  # fmt: skip

    observer, values = answered(lambda: run(frozenset()))
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
    shared = observer.shared
    del values

    def again(modules: frozenset[nn.Module]) -> dict[nn.Module, Seen]:
        return run(shared, modules)[0].seen

    return Observation(observer.seen, observer.around, observer.checkpointing, again)


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


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(values)[0] if isinstance(leaf, Tensor)]


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    """How often memory has been written into; a detached tensor counts with its source."""
    return [tensor._version for tensor in tensors if not tensor.is_inference()]


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
