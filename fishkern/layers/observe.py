"""Run a model on two examples, or one, back-propagate each one's loss alone, and record what its modules do.

From these records the survey decides which path computes each parameter (:mod:`fishkern.layers.survey`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fishkern import hosts
from fishkern.layers.documents import Documents
from fishkern.layers.hooks import hooks_of_others
from fishkern.layers.kept import KeptGrads
from fishkern.layers.reentrant import segment, stays
from fishkern.layers.row_order import ONE_EACH, RowOrder
from fishkern.layers.tap import Entered, FrozenCall, copied, frozen_call, leading_shape, tapped
from fishkern.layers.touched import Touched, TouchedColumns, order_of

# The same model computes the same losses, up to sums in another order where an axis is longer: some tens of roundings.
_SAME_LOSS = 64  # in units of the dtype's rounding


@dataclass
class Record:
    """The calls and output gradients of one module.

    Args:
        calls: Each call, with its tensors, and its output.
        touched: The non-zero rows of each output gradient.
        columns: The non-zero columns of each output gradient ``[T, N, ...]``; ``None`` for one of another shape.
        lengths: For each call ``T`` of the enclosing module's input ``[G N, T, ...]``, where there is one.
        block: That module.
        whole: For each call, whether it gets that module's input, merely reshaped.
        entered: For each call, the same with its tensors as they are before the hooks on its input run.
        versions: For each call, how often its tensors of ``entered`` and its output had been written into.
        was_rewritten: Whether copies have replaced an input that the model writes into.
        writes_input: Whether the module itself writes into its input. A gradient that reaches that input through
            another module that keeps it bypasses any tap on the output.
        axes: On packed rows: the axes, as long as a row, along which every gradient so far touches the positions of its
            own document alone; ``None`` before the first.
        untapped: Whether it was called inside a transform of ``torch.func`` (``vmap``, ``grad``), where rows are not
            those of the batch, or returned a nested tensor, which has none. Such calls are not among ``calls``.
        numbers: Of each call, as the how many-th of all it ended.
        hooks: For each call, what :func:`fishkern.layers.hooks.hooks_of_others` lists.
        kept: The gradients at the output of each call, if they are kept; of a call that none reached there are none.
        is_kept: Whether ``numbers``, ``hooks`` and ``kept`` say all of the calls that a pass would meet.
    """

    calls: list[tuple[FrozenCall, Any]] = field(default_factory=list)
    touched: list[Touched] = field(default_factory=list)
    columns: list[TouchedColumns | None] = field(default_factory=list)
    lengths: list[int | None] = field(default_factory=list)
    block: nn.Module | None = None
    whole: list[bool] = field(default_factory=list)
    entered: list[FrozenCall] = field(default_factory=list)
    versions: list[tuple[list[int], list[int]]] = field(default_factory=list)
    was_rewritten: bool = False
    writes_input: bool = False
    axes: frozenset[int] | None = None
    untapped: bool = False
    numbers: list[int] = field(default_factory=list)
    hooks: list[tuple[int, ...]] = field(default_factory=list)
    kept: dict[int, KeptGrads] = field(default_factory=dict)
    is_kept: bool = False

    @property
    def calls_with_gradient(self) -> set[int]:
        """Calls that a gradient reached."""
        return {touched.call for touched in self.touched}

    @property
    def input_rewritten(self) -> bool:
        """Whether the model has written into an input of a call, while the module ran or afterwards."""
        calls = zip(self.entered, self.versions, strict=True)
        return self.was_rewritten or any(versions_of(call.tensors) != before for call, (before, _) in calls)

    @property
    def output_rewritten(self) -> bool:
        """Whether the model has written into an output, as an activation in place does."""
        calls = zip(self.calls, self.versions, strict=True)
        return any(versions_of(_tensors(output)) != before for (_, output), (_, before) in calls)


@dataclass
class Observation:
    """The records of a model.

    Args:
        records: Of each module that was called and owns requested parameters, or encloses one that does.
        around: For each of these modules, those that were running at every one of its calls, itself included.
        checkpointing: Modules around segments under reentrant checkpointing.
        again: Runs the model once more and keeps copies of the inputs and outputs of some modules.
        entry: The module that was called first, on whose rows ``order`` speaks of.
        order: Which rows of the model's input each example has; ``None`` where the gradients leave it open.
        arrivals: For each module and call whose gradients are kept, as the how many-th they arrived.
    """

    records: dict[nn.Module, Record]
    around: dict[nn.Module, set[nn.Module]]
    checkpointing: set[nn.Module]
    again: Callable[[frozenset[nn.Module]], dict[nn.Module, Record]]
    entry: nn.Module | None = None
    order: RowOrder | None = ONE_EACH
    arrivals: Mapping[tuple[nn.Module, int], int] = field(default_factory=dict)

    def copy(self, modules: Collection[nn.Module]) -> None:
        """Replace the recorded tensors of modules by copies, where the model has written into them since.

        Args:
            modules: The modules; the model runs once more.
        """
        for module, copies in self.again(frozenset(modules)).items():
            record = self.records[module]
            if len(copies.calls) == len(record.calls) == 1:
                record.was_rewritten = record.input_rewritten
                record.calls, record.entered = copies.calls, copies.entered
                record.versions = [
                    (versions_of(call.tensors), versions_of(_tensors(out))) for call, out in record.calls
                ]


@dataclass(frozen=True)
class _Running:
    """A call that has not ended: its arguments, how often they had been written into, and whether in grad mode."""

    module: nn.Module
    arguments: tuple[tuple, dict[str, Any]]
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
        documents: Documents | None = None,
        rows: int | None = None,
        keeping: frozenset[nn.Module] = frozenset(),
    ) -> None:
        self._num_examples = num_examples
        self._keeping = keeping
        self._ended_calls = 0
        self.arrivals: dict[tuple[nn.Module, int], int] = {}
        self._documents = documents
        self._rows = rows if documents is None else num_examples
        self.entry: nn.Module | None = None
        self.records: dict[nn.Module, Record] = defaultdict(Record)
        self.around: dict[nn.Module, set[nn.Module]] = {}
        self.checkpointing: set[nn.Module] = set()
        self._paths = {module: path for path, module in observed.items()}
        self._modules = dict(model.named_modules())
        self.shared = shared
        self._copying = copying
        self._running: list[_Running] = []
        self._recomputes = False
        self._inputs: dict[nn.Module, Entered] = {}
        self._anchor = torch.zeros((), requires_grad=True)
        self._example = 0

    @contextmanager
    def hooked(self) -> Iterator[None]:
        handles = []
        # As close to the module's forward as possible: between a hook of ours and the forward, a hook of the user's
        # could replace the input or the output.
        for module in set(self._modules.values()):
            handles.append(module.register_forward_pre_hook(self._note_input, with_kwargs=True, prepend=True))
        for module in self._paths:
            handles.append(module.register_forward_hook(self._hook, with_kwargs=True, prepend=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @property
    def rows(self) -> int:
        """How many rows the model was called on, where they may be several for each example; else ``N``."""
        return self._num_examples if self._rows is None else self._rows

    def order(self, said: RowOrder) -> RowOrder | None:
        """Find by the rows that each loss touches where the model is left which rows each example has.

        Args:
            said: The order that the batch says.

        Returns:
            The order; ``None`` where none, or more than one, agrees with the gradients.
        """
        leaving = [one for module, one in self.records.items() if self.around.get(module) == {module}]
        reached = [one for record in leaving or self.records.values() for one in record.touched]
        return order_of(reached, self.rows, self._num_examples, said)

    def backward(self, losses: Tensor) -> None:
        self._recomputes = True
        with self.hooked():  # checkpointing recomputes segments here, whose gradients are recorded as well
            count = self._num_examples if losses.requires_grad else 0
            for self._example in range(count):
                losses[self._example].backward(retain_graph=self._example < count - 1)

    def _note_input(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._inputs[module] = Entered((args, kwargs))
        if self.entry is None:
            self.entry = module
        if self._rows is None:
            self._rows = self._rows_of(leading_shape((args, kwargs)))
        if module in self._paths:
            arguments = copied((args, kwargs)) if module in self._copying else (args, kwargs)
            running = _Running(module, arguments, versions_of(_tensors(arguments)), torch.is_grad_enabled())
            self._running.append(running)

    def _rows_of(self, shape: torch.Size) -> int:
        """Count the rows that the model is called on, by the shape of its first input."""
        N = self._num_examples
        second = len(shape) in (2, 3) and shape[1] == N  # as recurrent modules take them, [T, N, ...]
        return shape[0] if shape and shape[0] > N and shape[0] % N == 0 and not second else N

    def _ended(self, module: nn.Module) -> _Running:
        """Remove a module from those that run."""
        while True:  # above it are calls that never ended: a checkpoint stops recomputing half-way
            if (ended := self._running.pop()).module is module:
                return ended

    def _hook(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        self._note_enclosing(module)
        entered = self._ended(module)
        if torch._C._are_functorch_transforms_active() or any(leaf.is_nested for leaf in _tensors(output)):
            self.records[module].untapped = True
            return None
        if not torch.is_grad_enabled() and module not in self._copying:
            return None
        if module in self.shared and isinstance(output, Tensor):
            output = output.expand(self.rows, *output.shape[1:])
        record = self.records[module]
        receive = partial(self._receive, module, len(record.calls), hosts.split_of(module))
        record.block, length = self._enclosing(self._paths[module])
        record.lengths.append(length)
        record.whole.append(record.block is not None and self._inputs[record.block].is_reshaped((args, kwargs)))
        record.entered.append(frozen_call(module, *entered.arguments))
        if module in self._copying:
            record.calls.append((record.entered[-1], copied(output)))
            return None
        record.calls.append((frozen_call(module, args, kwargs), _detached(output)))
        self._note_kept(module, record)
        record.writes_input |= versions_of(record.entered[-1].tensors) != entered.versions
        record.versions.append((entered.versions, versions_of(_tensors(output))))
        # the record keeps the tensors of the call, so autograd need not
        return tapped(output, self._anchor, receive, frozen_call(module, (), {}))

    def _note_kept(self, module: nn.Module, record: Record) -> None:
        """Note of a call what a capture needs beside its tensors and gradients."""
        if module not in self._keeping:
            return
        record.is_kept = (record.is_kept or not record.numbers) and not self._recomputes
        record.numbers.append(self._ended_calls)
        record.hooks.append(hooks_of_others(module))
        self._ended_calls += 1

    def _note_enclosing(self, module: nn.Module) -> None:
        """Note which modules are running around a call that has just ended."""
        running = {one.module for one in self._running}
        inside = None if torch.is_grad_enabled() else segment()
        # A recomputed segment runs in backward, without the modules around it.
        if not self._recomputes and (inside or torch.is_grad_enabled()):
            self.around[module] = running & self.around.get(module, running)
        if inside and stays(inside):
            self.checkpointing |= {one.module for one in self._running if one.with_grad}

    def _receive(
        self, module: nn.Module, call: int, split: hosts.Split | None, _: Any, grads: tuple[Tensor | None, ...]
    ) -> None:
        """Record which rows, and columns, of the gradients at a call's output are not zero."""
        record = self.records[module]
        if record.is_kept:
            self.arrivals.setdefault((module, call), len(self.arrivals))
            kept = record.kept.setdefault(call, KeptGrads(len(grads)))
            record.is_kept = kept.keep(self._example, grads, self._num_examples)
        for grad in grads:
            if grad is None:
                continue
            grad = hosts.local_part(grad)
            rows = grad.ne(0).unsqueeze(-1).flatten(1).any(1) if grad.ndim else grad.new_zeros(0)
            rows = hosts.in_any(rows, split)
            length = grad.shape[0] if grad.ndim else None
            if self._documents is not None:
                axes = self._own_axes(grad)
                record.axes = axes if record.axes is None else record.axes & axes
            record.touched.append(Touched(call, self._example, length, rows.nonzero()))
            columns = None
            if grad.ndim > 2 and grad.shape[1] == self._num_examples > 1:
                columns = TouchedColumns(self._example, grad.ne(0).transpose(0, 1).flatten(1).any(1).nonzero())
            record.columns.append(columns)

    def _own_axes(self, grad: Tensor) -> frozenset[int]:
        """List the axes along which a gradient touches the positions of the example's document alone."""
        fitting = [axis for axis in range(1, grad.ndim) if self._documents.fit(grad, axis)]
        return frozenset(axis for axis in fitting if self._documents.touched(grad, axis) <= {self._example})

    def _enclosing(self, path: str) -> tuple[nn.Module | None, int | None]:
        """Find the nearest enclosing module whose input is ``[G N, T, ...]``, and ``T``."""
        while path:
            path = path.rpartition(".")[0]
            module = self._modules[path]
            entered = self._inputs.get(module)
            rows, length = (entered and entered.rows_and_length) or (None, None)
            if rows == self.rows:
                return module, length
        return None, None


def observe(
    model: nn.Module,
    owners: Mapping[str, Mapping[str, str]],
    losses: Callable[[], Tensor],
    answered: Callable[[Callable[[], Any]], Any],
    num_examples: int,
    documents: Documents | None = None,
    order: RowOrder = ONE_EACH,
    *,
    keep: bool = False,
) -> Observation:
    """Run the model on a few examples, back-propagate the loss of each alone, and record what happens at its modules.

    An output shared by all examples (leading size 1) is expanded where that changes no loss.

    Args:
        model: The model, its weights frozen.
        owners: Requested parameters by the paths of the modules that own them.
        losses: Runs the model and returns the losses.
        answered: Calls a function that runs the model, twice where segments of the model are cut off
            (:meth:`fishkern.layers.reentrant.Connection.answered`).
        num_examples: 2, or 1.
        documents: The examples, if they are documents of packed rows.
        order: Which rows an example has, as far as the batch says it.
        keep: Whether to keep the gradients at the outputs of modules that own parameters, not of packed rows.

    Returns:
        The records.
    """
    common = (model, owners, losses, answered, num_examples, documents, order, keep and documents is None)
    observation = _observe(*common, rows=None if order == ONE_EACH else order.count(num_examples))
    # an input [T, N, ...] looks like T / N rows for each example, until the gradients have come
    return observation if observation.order is not None else _observe(*common, rows=num_examples)


def _observe(
    model: nn.Module,
    owners: Mapping[str, Mapping[str, str]],
    losses: Callable[[], Tensor],
    answered: Callable[[Callable[[], Any]], Any],
    num_examples: int,
    documents: Documents | None,
    said: RowOrder,
    keep: bool,
    *,
    rows: int | None,
) -> Observation:
    """Observe a model on a number of rows; ``None`` for that of its input."""
    modules = dict(model.named_modules())
    observed = {path: modules[path] for owner in owners for path in upwards(owner) if path or owner == ""}
    owning = {modules[path] for path in owners}

    def run(shared: frozenset[nn.Module], copying: frozenset[nn.Module] = frozenset()) -> tuple[_Observer, Tensor]:
        keeping = frozenset(owning) if keep else frozenset()
        observer = _Observer(model, observed, shared, num_examples, copying, documents, rows, keeping)
        with observer.hooked():
            return observer, losses()

    observer, values = answered(lambda: run(frozenset()))
    several = observer.rows > 1 and documents is None  # all packed documents may be in one row
    candidates = _of_all_examples(observer, owning) if several else []
    if candidates:
        expected = values.detach()
        del observer, values  # and the activations that they keep
        observer, values = _expanded(run, frozenset(), candidates, expected)
    observer.backward(values)
    late = [one for one in _of_all_examples(observer, owning) if one not in candidates] if several else []
    if late:  # calls inside a checkpointed segment are recorded only when it is recomputed
        observer, values = _expanded(run, observer.shared, late, values.detach())
        observer.backward(values)
    shared, entry, order = observer.shared, observer.entry, observer.order(said)
    del values

    def again(modules: frozenset[nn.Module]) -> dict[nn.Module, Record]:
        return run(shared, modules)[0].records

    seen = (observer.records, observer.around, observer.checkpointing)
    return Observation(*seen, again, entry, order, observer.arrivals)


def _of_all_examples(observer: _Observer, owning: set[nn.Module]) -> list[nn.Module]:
    """List the modules whose every output is one row, which all examples share (position embeddings)."""
    # in the order of their calls: the ranks of a sharded model try them one after the other, and all try the same one
    return [
        module
        for module, record in observer.records.items()
        if module in owning and record.calls
        and all(isinstance(output, Tensor) and output.ndim > 1 and output.shape[0] == 1 for _, output in record.calls)
    ]  # fmt: skip


def _expanded(
    run: Callable[..., tuple[_Observer, Tensor]],
    shared: frozenset[nn.Module],
    candidates: Sequence[nn.Module],
    expected: Tensor,
) -> tuple[_Observer, Tensor]:
    """Run with those shared outputs expanded that change no loss: all of the candidates, or some, or none."""
    if expanded := _same_losses(run, shared.union(candidates), expected):
        return expanded
    alone = candidates if len(candidates) > 1 else ()
    return run(shared | {module for module in alone if _same_losses(run, shared | {module}, expected)})


def _same_losses(
    run: Callable[..., tuple[_Observer, Tensor]], shared: frozenset[nn.Module], expected: Tensor
) -> tuple[_Observer, Tensor] | None:
    try:
        observer, values = run(shared)
    except Exception:  # any error of the model or the loss: it needs the axis to be 1
        return None
    same = torch.allclose(values, expected, rtol=_SAME_LOSS * torch.finfo(expected.dtype).eps, atol=0.0)
    return (observer, values) if same else None


def _detached(output: Any) -> Any:
    leaves, spec = tree_flatten(output)
    return tree_unflatten([leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(values)[0] if isinstance(leaf, Tensor)]


def versions_of(tensors: Sequence[Tensor]) -> list[int]:
    """Count how often each tensor's memory has been written into; a detached tensor shares its source's count.

    Args:
        tensors: Any, of which those of inference mode have no count.

    Returns:
        The counts of the others.
    """
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
