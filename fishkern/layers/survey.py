"""The survey: decide which path computes each parameter, and which rows of each call belong to which example.

Nothing is guessed from shapes. The model runs on two examples, the loss of each is back-propagated alone, and the rows
of a call where the output gradient is not zero are the example's rows: one, or several where the model runs on several
for each example, side by side or ``N`` apart (:class:`fishkern.layers.row_order.RowOrder`). A parameter without a rule,
or whose rows cannot be assigned to examples, takes the generic path: the smallest enclosing module that keeps the
example axis, its host, runs once more for each example. Without a host it takes a loop over the whole model. If the
first batch holds one example, the model runs on that one, and the plan serves batches of one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from fishkern.layers.base import Layer
from fishkern.layers.documents import Documents
from fishkern.layers.observe import Record, observe
from fishkern.layers.packed_planner import PackedPlanner
from fishkern.layers.path_plan import Plan
from fishkern.layers.planner import Planner, Whole, last_call
from fishkern.layers.quantized import own_weights
from fishkern.layers.replay import Replay
from fishkern.layers.row_order import ONE_EACH, RowOrder
from fishkern.layers.rules import rule_of
from fishkern.layers.sample import confirmed_on_sample
from fishkern.layers.site import Layout

_HOOKED = (
    "a hook on it (register_hook) may change the gradient of each example; without the hook, its layer's rule computes "
    "the gradient"
)


def survey(
    model: nn.Module,
    keys: Mapping[Tensor, str],
    losses: Callable[[], Tensor],
    *,
    distrusted: Collection[str] = (),
    answered: Callable[[Callable[[], Any]], Any] = lambda run: run(),
    num_examples: int = 2,
    documents: Documents | None = None,
    order: RowOrder = ONE_EACH,
    whole: Whole = nullcontext,
    keep: bool = False,
) -> tuple[Plan, Replay | None]:
    """Decide which path computes each parameter.

    Args:
        model: In evaluation mode, its weights frozen; left without hooks.
        keys: Canonical name of each requested parameter or stored weight.
        losses: Runs the model on two examples, or one, and returns their losses; called at least once.
        distrusted: Paths of modules whose row count turned out to depend on the data.
        answered: Calls a function that runs the model (:meth:`fishkern.layers.reentrant.Connection.answered`).
        num_examples: 2; or 1, for a plan that serves batches of one.
        documents: The examples, if they are documents of packed rows; the plan serves batches of such rows.
        order: Which rows an example has, as far as the batches say it: where they say one row, and the model runs on
            several for each example, it is checked on every batch whose they are.
        whole: Lets a call run once more, see :data:`fishkern.layers.planner.Whole`.
        keep: Whether to keep what a capture needs to give the gradients of these examples.

    Returns:
        The plan; and what is kept, or ``None`` if nothing is, or a capture needs a pass of its own.
    """
    hooked, owners = _owners(model, keys)
    observation = observe(model, owners, losses, answered, num_examples, documents, order, keep=keep)

    def planner() -> Planner:
        if documents is not None:
            return PackedPlanner(model, owners, observation, distrusted, documents, whole)
        return Planner(model, owners, observation, distrusted, num_examples, order, whole)

    first = planner()
    plan = first.plan()
    if first.rewritten:
        observation.copy(first.rewritten)
        plan = planner().plan()
    return plan.with_loop(hooked), Replay.of(plan, observation, num_examples) if keep else None


def foresee(
    model: nn.Module,
    keys: Mapping[Tensor, str],
    losses: Callable[[], Tensor],
    *,
    answered: Callable[[Callable[[], Any]], Any] = lambda run: run(),
    num_examples: int = 2,
    order: RowOrder = ONE_EACH,
) -> Plan:
    """Foresee the plan of a survey from a model without values, whose gradients do not show whose rows they are.

    A rule serves where the sizes of the rows allow it. What a rule needs to see computed is computed by a copy of the
    module, with random values.

    Args:
        model: As for :func:`survey`, with tensors without values.
        keys: As for :func:`survey`.
        losses: As for :func:`survey`.
        answered: As for :func:`survey`.
        num_examples: As for :func:`survey`.
        order: As for :func:`survey`.

    Returns:
        The plan. Its loop holds, with the reason, every parameter of which only a run can tell the path.
    """
    hooked, owners = _owners(model, keys)
    observation = observe(model, owners, losses, answered, num_examples, order=order)
    return _Foreseeing(model, owners, observation, (), num_examples, order).plan().with_loop(hooked)


def served_by_rule(model: nn.Module, keys: Mapping[str, Tensor]) -> frozenset[str]:
    """List the parameters that a rule computes as far as their modules show, before any call.

    Args:
        model: Any module.
        keys: Parameters and stored weights by canonical name.

    Returns:
        Names of those all of whose modules have a rule that needs no call to confirm it.
    """
    served: dict[str, list[bool]] = defaultdict(list)
    _, owners = _owners(model, {parameter: key for key, parameter in keys.items()})
    modules = dict(model.named_modules())
    for path, requested in owners.items():
        rule = rule_of(modules[path])
        for name, key in requested.items():
            by_rule = rule is not None and name in rule.covers(modules[path])
            served[key].append(by_rule and _needs_no_call(rule, modules[path]))
    return frozenset(key for key, each in served.items() if all(each))


def hooked_parameters(keys: Mapping[Tensor, str]) -> dict[str, str]:
    """List the parameters with a hook on their gradient, which takes the loop in any case.

    Args:
        keys: Parameters, with their canonical names.

    Returns:
        Why, by canonical name.
    """
    return {key: _HOOKED for parameter, key in keys.items() if parameter._backward_hooks}


def _needs_no_call(layer: Layer, module: nn.Module) -> bool:
    """Tell whether a rule that covers a module holds without a look at a call."""
    return type(layer).confirms is Layer.confirms or type(module).forward is nn.Embedding.forward


def _owners(model: nn.Module, keys: Mapping[Tensor, str]) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """List why some parameters take the loop in any case, and the requested others by the paths of their modules."""
    hooked = hooked_parameters(keys)
    keys = {parameter: key for parameter, key in keys.items() if key not in hooked}
    owners: dict[str, dict[str, str]] = {}
    for path, module in model.named_modules():
        requested = {name: keys[tensor] for name, tensor in own_weights(module).items() if tensor in keys}
        if requested and not isinstance(module, nn.ParameterDict | nn.ParameterList):
            owners[path] = requested
    _adopt(model, owners)
    return hooked, owners


def _adopt(model: nn.Module, owners: dict[str, dict[str, str]]) -> None:
    """Let a module own the parameters of modules inside it that a rule computes at its own call."""
    for path, module in model.named_modules():
        layer = rule_of(module)
        for name in sorted(layer.covers(module)) if layer is not None else ():
            within, _, own = name.rpartition(".")
            owner = f"{path}.{within}".removeprefix(".")
            if within and own in owners.get(owner, {}):
                owners.setdefault(path, {})[name] = owners[owner].pop(own)
                if not owners[owner]:
                    del owners[owner]


class _Foreseeing(Planner):
    """Turns the records of a model without values into sites: a layout that fits the sizes is taken to hold."""

    def _layout(self, record: Record) -> tuple[Layout | None, bool]:
        layout, _ = super()._layout(record)
        return layout, layout is not None

    def _confirmed(self, layer: Layer, record: Record, names: frozenset[str]) -> frozenset[str]:
        call, _ = last_call(record, entered=layer.reruns)
        if _needs_no_call(layer, call.module):
            return names
        return confirmed_on_sample(layer, call, names)

    def _why_no_host(self, path: str) -> str:
        return "no rule serves its module; whether a module around that keeps the examples apart shows when it runs"
