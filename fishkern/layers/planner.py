"""Turn what was observed of two examples into sites: rules where rows are known, hosts elsewhere, else the loop."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from fishkern.layers.base import Call, Layer
from fishkern.layers.generic import has_example_axis, same_rows_alone, tensors_of
from fishkern.layers.observe import Observation, Record, upwards
from fishkern.layers.path_plan import Plan
from fishkern.layers.row_order import ONE_EACH, RowOrder
from fishkern.layers.rules import rules_for
from fishkern.layers.site import Idle, Layout, Site
from fishkern.layers.tap import FrozenCall, floating_places, leading_shape
from fishkern.layers.touched import owned

# Modules of torch that have their examples on the second axis unless they are made with batch_first.
_SECOND_AXIS = (
    nn.RNNBase, nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.Transformer
)  # fmt: skip


Whole = Callable[[Call], AbstractContextManager[Any]]
"""Lets a call run once more outside of the model's own passes: it gathers parameters that are sharded."""


class Planner:
    """Turns the records of an observation into sites.

    Attributes:
        rewritten: Modules of which it can no longer be checked whether they keep the examples apart: the model has
            written into their outputs since.
    """

    def __init__(
        self,
        model: nn.Module,
        owners: Mapping[str, Mapping[str, str]],
        observation: Observation,
        distrusted: Collection[str],
        num_examples: int,
        order: RowOrder = ONE_EACH,
        whole: Whole = nullcontext,
    ) -> None:
        self._whole = whole
        self._modules = dict(model.named_modules())
        self._places: dict[nn.Module, list[str]] = defaultdict(list)  # of a module object, as often as it is registered
        self._by_any_path = dict(model.named_modules(remove_duplicate=False))
        for path, module in self._by_any_path.items():
            self._places[module].append(path)
        self._around = observation.around
        self._checkpointing = observation.checkpointing
        self.rewritten: set[nn.Module] = set()
        self._distrusted = distrusted
        self._owners = owners
        self._records = observation.records
        self._num_examples = num_examples
        self._order = observation.order or ONE_EACH
        # a batch of pairs says itself which rows are whose; those of one example are all its own
        self._entry = None if order == self._order or num_examples == 1 else observation.entry
        self._inside = frozenset() if self._entry is None else frozenset(self._entry.modules())

    def plan(self) -> Plan:
        """Make the plan.

        Returns:
            The plan: what a rule serves, what a host serves, and what is left to the loop, with the reason.
        """
        sites: list[Site] = []
        hosts: dict[str, dict[str, str]] = defaultdict(dict)
        loop: dict[str, str] = {}
        idle: list[Idle] = []
        owners = self._owners_of_each_key()
        for path, requested in self._owners.items():
            requested = {name: key for name, key in requested.items() if path in owners[key]}
            by_rule = self._by_rule(path, requested)
            sites += by_rule
            served = {key for site in by_rule for key in site.keys.values()}
            for name, key in requested.items():
                if key in served:
                    continue
                if len(owners[key]) > 1 and not any(map(self._is_called, owners[key])):
                    loop[key] = "several modules share it, and the first examples called none of them"
                elif len(owners[key]) > 1 and not self._is_called(path):
                    # It adds no gradient: the other modules give all of it, until a later batch calls this one.
                    idle.append(Idle(self._modules[path], path, key))
                elif len(owners[key]) > 1:
                    loop[key] = f"several modules share it, and {path} has no rule for it"
                elif (host := self._host(path)) is not None:
                    hosts[host][f"{path}.{name}".removeprefix(f"{host}.")] = key
                else:
                    loop[key] = self._why_no_host(path)
        sites += [self._generic_site(path, inside) for path, inside in hosts.items()]
        calls = {key: sum(len(self._calls(path)) for path in paths) for key, paths in owners.items()}
        # these get their gradient in several parts, and the self-check must wait for the last one
        reused = frozenset(key for key, count in calls.items() if count != 1)
        return Plan(tuple(sites), {}, reused, tuple(idle)).with_loop(loop)

    def _owners_of_each_key(self) -> dict[str, list[str]]:
        """List the paths of the modules that own each parameter.

        A module that merely registers what a module inside it uses (the bias of BERT's prediction head, which is its
        decoder's) does not count. If it does use it, the self-check detects that.

        Returns:
            Paths by canonical name.
        """
        owners: dict[str, list[str]] = defaultdict(list)
        for path, requested in self._owners.items():
            for key in requested.values():
                owners[key].append(path)
        for paths in owners.values():
            inner = [path for path in paths if self._is_called(path)]
            paths[:] = [path for path in paths if not any(_is_inside(other, path) for other in inner)]
        return owners

    def _calls(self, path: str) -> list[tuple[FrozenCall, Any]]:
        record = self._records.get(self._modules[path])
        return record.calls if record else []

    def _is_called(self, path: str) -> bool:
        record = self._records.get(self._modules[path])
        return record is not None and (bool(record.calls) or record.untapped)

    def _by_rule(self, path: str, requested: Mapping[str, str]) -> list[Site]:
        """Make a site for each rule that computes some of a module's parameters, if its layout is known."""
        module = self._modules[path]
        record = self._records.get(module)
        if record is None or record.writes_input or record.untapped or path in self._distrusted:
            return []
        layout, settled = self._layout(record)
        picked = layout is Layout.FLATTENED or (layout is Layout.BATCHED and self._are_picked(record))
        if layout is None or (picked and self._is_used_again(record)):
            return []
        several = not all(isinstance(output, Tensor) for _, output in record.calls)
        if several and picked and not all(record.whole):  # of several tensors it is not checked on every batch
            return []
        sites = []
        remaining = dict(requested)
        for layer in rules_for(module):
            names = layer.covers(module) & remaining.keys() if several <= layer.several else frozenset()
            if names:
                with self._whole(last_call(record, entered=layer.reruns)[0]):
                    names = self._confirmed(layer, record, names)
            if names:
                keys = {name: remaining.pop(name) for name in sorted(names)}
                dealt = self._dealt(path, record)
                site = Site(path, module, layer, keys, layout, record.block, settled=settled, **dealt)
                more = {"picked": picked, "rewritten": record.input_rewritten, "axis": self._axis(record)}
                sites.append(replace(site, **more))
        return sites

    def _is_used_again(self, record: Record) -> bool:
        """Tell whether gradients of one example reach several calls; a recomputed call is not a use of its own."""
        uses = {(rows.example, rows.call) for rows in record.touched}
        if not uses:
            return len(record.calls) > 1
        return max(Counter(example for example, _ in uses).values()) > 1

    def _confirmed(self, layer: Layer, record: Record, names: frozenset[str]) -> frozenset[str]:
        """Check on the last call of a module which of its parameters a rule computes."""
        return layer.confirms(*last_call(record, entered=layer.reruns), names)

    def _layout(self, record: Record) -> tuple[Layout | None, bool]:
        """Find the layout that fits every call, and say whether a gradient confirms it."""
        touched = [rows for rows in record.touched if len(rows.nonzero)]
        calls = record.calls_with_gradient or set(range(len(record.calls)))
        outputs = [_floating(record.calls[call][1]) for call in sorted(calls)]
        if not all(tensors and all(one.ndim for one in tensors) for tensors in outputs):
            return None, False
        rows = {one.shape[0] for tensors in outputs for one in tensors}
        lengths = {record.lengths[call] for call in calls}
        order = self._order_of(record)
        R, owners = order.count(self._num_examples), order.owners(self._num_examples)
        if rows == {R} and all(owned(one, owners) for one in touched):
            inputs = {leading_shape((call.tensors,)) for call, _ in (record.calls[call] for call in sorted(calls))}
            # The observer has expanded outputs that all examples share, so that these have R rows as well. The input
            # still shows it: a call on one row, such as the positions [1, T] of an embedding.
            once_for_all = R > 1 and {shape[0] for shape in inputs if shape} == {1}
            return (Layout.SHARED if once_for_all else Layout.BATCHED), bool(touched)
        if len(rows) == len(lengths) == 1 and None not in lengths:
            (length,) = lengths
            if rows == {R * length} and all(owned(one, owners, length) for one in touched):
                return Layout.FLATTENED, bool(touched)
        return None, False

    def _order_of(self, record: Record) -> RowOrder:
        """Say which rows of a module an example has: those of the model's input, or one each, where there are ``N``."""
        outputs = [output for _, output in record.calls]
        ones = {one.shape[0] if one.ndim else None for output in outputs for one in _floating(output)}
        return ONE_EACH if ones == {self._num_examples} else self._order

    def _dealt(self, path: str, record: Record) -> dict[str, Any]:
        """Say of a site which rows its examples have, and where that is checked."""
        order = self._order_of(record)
        checked = order.per_example > 1 and self._entry is not None
        return {"order": order, "entry": self._entry_of(self._modules[path]) if checked else None}

    def _entry_of(self, module: nn.Module) -> nn.Module:
        """Find the outermost module around one: a loss function may call parts of a model, and order rows between."""
        if module in self._inside:
            return self._entry
        around = self._around.get(module, {module})
        return next((one for one in around if self._around.get(one) == {one}), module)

    def _axis(self, record: Record) -> int:
        """Say which axis of an output is that of the positions, which matters for packed rows alone."""
        return 1

    def _host(self, path: str) -> str | None:
        """Find the smallest module around a module, below the root, that keeps the examples apart.

        A module that is registered in several places needs a host around all of them, because the first examples need
        not reach every use.

        Returns:
            Its path, or ``None`` where there is no such module.
        """
        places = self._places[self._modules[path]]
        around = (host for host in upwards(path) if host and all(f"{at}.".startswith(f"{host}.") for at in places))
        return next((host for host in around if self._serves(host, path)), None)

    def _serves(self, host: str, path: str) -> bool:
        """Tell whether a module keeps the examples apart and is running during every call of one inside it."""
        module = self._modules[host]
        return host not in self._distrusted and self._encloses(module, path) and self._keeps_examples(module)

    def _encloses(self, module: nn.Module, path: str) -> bool:
        inner = self._modules[path]
        if inner is module:
            return True
        if (around := self._around.get(inner)) is not None:
            return module in around
        # never called: a mere container of parameters that other modules read
        paths = [at for at, one in self._by_any_path.items() if one is inner]
        return all(any(self._by_any_path[at] is module for at in upwards(one)) for one in paths)

    def _why_no_host(self, path: str) -> str:
        """Say why only the loop is left, and how to avoid it where that is possible."""
        if path in self._distrusted:
            return (
                f"the rows of {path} are not those of the examples, or their number follows the data, or it is called "
                "several times"
            )
        if (record := self._records.get(self._modules[path])) is not None and record.writes_input:
            return f"{path or 'the model'} writes into its input, which others may hold"
        reason = "no module below the whole model keeps its examples apart"
        around = [self._modules[at] for at in upwards(path) if at]
        of_torch = next((one for one in reversed(around) if isinstance(one, _SECOND_AXIS)), None)
        second = [one for one in around if self._has_examples_second(one)]
        has, ways = "also returns its last state, whose examples are", []
        if of_torch is not None and not _is_batch_first(of_torch):
            has, ways = "has its examples", ["make it with batch_first=True"]
        elif second and of_torch is None:
            has, ways = "has its examples", ["put it into a module that takes and returns them along the first"]
        if isinstance(of_torch, nn.RNNBase):
            ways.append("put it into a module that returns its output alone")
        if not ways:
            called = self._modules[path] in self._records or self._modules[path] in self._around
            return reason if called else f"{path} was not called by the first examples, and {reason}"
        module = of_torch if of_torch is not None else second[-1]
        return f"{reason} ({type(module).__name__} {has} along the second axis: {' and '.join(ways)})"

    def _has_examples_second(self, module: nn.Module) -> bool:
        """Tell whether a module has its examples along the second axis, ``[T, N, ...]``, as its gradients show."""
        record = self._records.get(module)
        columns = record.columns if record else []
        apart = all(one is not None and bool((one.nonzero == one.example).all()) for one in columns)
        return apart and {one.example for one in columns if len(one.nonzero)} == {0, 1}

    def _keeps_examples(self, module: nn.Module) -> bool:
        record = self._records.get(module)
        # the generic path reruns one call; a sum over several would need the inputs of each
        if record is None or len({rows.call for rows in record.touched if rows.example == 0}) != 1:
            return False
        if record.untapped or self._are_picked(record) or record.writes_input or module in self._checkpointing:
            return False
        if not self._touches_apart(record):
            return False
        if record.output_rewritten or (record.input_rewritten and not record.was_rewritten):
            self.rewritten.add(module)
            return False
        call, output = last_call(record, entered=True)
        with self._whole(call):
            return self._runs_alone(record, call, output)

    def _touches_apart(self, record: Record) -> bool:
        """Tell whether the gradients at a module are not zero, and there at the rows of their own example alone."""
        touched = [rows for rows in record.touched if len(rows.nonzero)]
        owners = self._order_of(record).owners(self._num_examples)
        return bool(touched) and all(owned(one, owners) for one in touched)

    def _runs_alone(self, record: Record, call: Call, output: Any) -> bool:
        return same_rows_alone(call, output, self._num_examples, order=self._order_of(record))

    def _is_sliced(self, record: Record, tensor: Tensor) -> bool:
        """Tell whether a tensor of a call of a host is cut for each example."""
        return has_example_axis(tensor, self._order_of(record).count(self._num_examples))

    def _are_picked(self, record: Record) -> bool:
        """Tell whether a module gets rows ``[G N, features]`` inside one that got ``[G N, T, ...]``, ``N > 1``."""
        if self._num_examples == 1:
            return False
        call, output = record.calls[-1]
        rows = next((tensor for tensor in call.tensors if tensor.ndim), None)
        inside = isinstance(output, Tensor) and output.ndim == 2 and (record.lengths[-1] or 1) > 1
        return inside and rows is not None and rows.ndim == 2 and rows.is_floating_point()

    def _generic_site(self, path: str, keys: Mapping[str, str]) -> Site:
        record = self._records[self._modules[path]]
        call, _ = last_call(record, entered=True)
        sliced = tuple(self._is_sliced(record, tensor) for tensor in tensors_of(call))
        more = {"sliced": sliced, "rewritten": record.input_rewritten, **self._dealt(path, record)}
        return Site(path, self._modules[path], None, dict(keys), Layout.BATCHED, **more)


def _is_batch_first(module: nn.Module) -> bool:
    """Tell whether a module of torch was made with ``batch_first``, which not every module keeps as an attribute."""
    inner = (one for one in module.modules() if isinstance(one, nn.RNNBase | nn.MultiheadAttention))
    return all(one.batch_first for one in inner)


def last_call(record: Record, *, entered: bool) -> tuple[Call, Any]:
    """Return the last call that a gradient reached, or else the last one; with ``entered``, as it was before hooks."""
    index = max(record.calls_with_gradient, default=len(record.calls) - 1)
    call, output = record.calls[index]
    call = record.entered[index] if entered else call
    return call.thaw(call.tensors), output


def _floating(output: Any) -> list[Tensor]:
    """List the tensors of an output that can have a gradient."""
    leaves, _ = tree_flatten(output)
    return [leaves[place] for place in floating_places(leaves)]


def _is_inside(path: str, other: str) -> bool:
    return path != other and (not other or path.startswith(f"{other}."))
