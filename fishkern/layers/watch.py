"""Watch linear maps while a model trains: their activations and output gradients, from the training step's own passes.

Weights may require gradients and get theirs as usual; nothing is frozen, and no example axis is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

from torch import nn

from fishkern import hosts
from fishkern.layers.base import Layer
from fishkern.layers.grads import OuterProductGrads
from fishkern.layers.hooks import Arrival, Hooks
from fishkern.layers.rules import rules_for
from fishkern.layers.site import Site
from fishkern.layers.unsupported import UnsupportedModuleError, leave_out
from fishkern.names import without_wrappers


@contextmanager
def watch(model: nn.Module, names: Collection[str], sink: Callable[[str, OuterProductGrads], None]) -> Iterator[None]:
    """Report the factors of weight gradients during every backward pass inside the ``with`` block.

    The sum over ``t`` and over the rows of ``output_grads (x) activations`` of all calls is what autograd adds to the
    weight's ``.grad``. A weight that is used several times in a step is reported once for each use. Gradients are off
    while ``sink`` runs.

    Args:
        model: In any mode, with any weights requiring gradients.
        names: Canonical names of weights of linear maps (``nn.Linear``, ``Conv1D``, convolutions without groups).
        sink: Called with a weight's name and its factors, whose first axis is that of the call's input.

    Yields:
        Nothing.

    Raises:
        UnsupportedModuleError: A name does not belong to such a weight.
    """
    sites, refused = _sites(model, frozenset(names))
    served = {key for site in sites for key in site.keys.values()} - refused
    if missing := sorted(set(names) - served):
        raise UnsupportedModuleError(
            f"{missing} are not weights of linear maps alone, whose gradients have activations and output gradients as "
            f"factors. {leave_out(missing, by_autograd=False)}"
        )

    def arrived(arrival: Arrival) -> None:
        with arrival.without_autocast():
            for key, grads in arrival.per_example_grads():
                sink(key, grads)

    with Hooks(sites, arrived) as hooks, hooks.running():
        yield


def _sites(model: nn.Module, names: frozenset[str]) -> tuple[list[Site], set[str]]:
    """Make a site of each linear map, and name the parameters that another kind of module uses as well."""
    keys = {parameter: key for key, parameter in hosts.named_parameters(model).items() if key in names}
    sites, refused = [], set()
    for path, module in model.named_modules():
        owned = {name: keys[one] for name, one in module._parameters.items() if one is not None and one in keys}
        if not owned:
            continue
        layer = _rule(module)
        weights = {name: key for name, key in owned.items() if layer is not None and layer.gives_factors(name)}
        refused |= set(owned.values()) - set(weights.values())
        if weights:
            sites.append(Site(without_wrappers(path), module, layer, weights, None))
    return sites, refused


def _rule(module: nn.Module) -> Layer | None:
    """Find the rule of a module that needs no call to confirm it."""
    return next((one for one in rules_for(module) if one.covers(module) and type(one).confirms is Layer.confirms), None)
