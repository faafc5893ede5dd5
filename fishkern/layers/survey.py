"""The survey: which rule serves each parameter, and which rows of each call belong to which example.

Nothing is guessed from shapes. The model runs on two examples, the loss of each is back-propagated alone, and the rows
of a call where the output gradient is not zero are the example's rows. What no rule serves, or whose rows cannot be
told apart, goes to the smallest enclosing module that keeps the example axis, and runs that module once more for each
example; what has none goes to a loop over the whole model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from fishkern.layers.base import Call, Layer
from fishkern.layers.convolution import Convolution
from fishkern.layers.embedding import Embedding
from fishkern.layers.generic import has_example_axis, same_rows_alone, tensors_of
from fishkern.layers.layer_norm import LayerNorm
from fishkern.layers.linear import Conv1D, Linear, QuantizedLinear
from fishkern.layers.observe import Seen, observe, upwards
from fishkern.layers.quantized import own_weights
from fishkern.layers.scale import Factor, OnePlusFactor, Scale
from fishkern.layers.site import Layout, Site
from fishkern.layers.tap import FrozenCall, leading_shape

LAYERS: tuple[Layer, ...] = (
    Linear(), QuantizedLinear(), Conv1D(), Embedding(), LayerNorm(), Convolution(), Factor(), OnePlusFactor(), Scale()
)  # fmt: skip
"""The rules, first match first. A new kind of layer is one more entry."""


@dataclass(frozen=True)
class Plan:
    """How each parameter of a pass is served.

    Args:
        sites: Modules whose calls are captured.
        loop: Parameters that need the loop over the whole model, with the reason in words.
        reused: Parameters used more than once in a forward pass.
    """

    sites: tuple[Site, ...]
    loop: Mapping[str, str]
    reused: frozenset[str] = frozenset()

    @property
    def paths(self) -> dict[str, tuple[str, str]]:
        """Path (``"fused"``, ``"generic"`` or ``"loop"``) and reason for each parameter, by canonical name."""
        paths = {key: ("loop", reason) for key, reason in self.loop.items()}
        for site in self.sites:
            path = ("fused", "") if site.layer else ("generic", f"through {site.path} ({type(site.module).__name__})")
            paths |= dict.fromkeys(site.keys.values(), path)
        return paths

    def with_loop(self, reasons: Mapping[str, str]) -> Plan:
        """Send further parameters through the loop.

        Args:
            reasons: Why, by canonical name.

        Returns:
            The changed plan.
        """
        kept = self.only({key for site in self.sites for key in site.keys.values()} - reasons.keys())
        return Plan(kept.sites, {**self.loop, **reasons}, self.reused)

    def only(self, wanted: Collection[str]) -> Plan:
        """Restrict the plan to some parameters.

        Args:
            wanted: Their canonical names.

        Returns:
            The smaller plan.
        """
        sites = []
        for site in self.sites:
            if keys := {name: key for name, key in site.keys.items() if key in wanted}:
                sites.append(replace(site, keys=keys))
        loop = {key: reason for key, reason in self.loop.items() if key in wanted}
        return Plan(tuple(sites), loop, self.reused)


def survey(
    model: nn.Module,
    keys: Mapping[Tensor, str],
    losses: Callable[[], Tensor],
    distrusted: Collection[str] = (),
) -> Plan:
    """Establish how each parameter is served.

    Args:
        model: In evaluation mode, its weights frozen; left without hooks.
        keys: Canonical name of each parameter or stored weight asked for.
        losses: Runs the model on two examples and returns their losses, ``[2]``; called once or more times.
        distrusted: Paths of modules whose rows have been seen to follow the data.

    Returns:
        The plan.
    """
    owners: dict[str, dict[str, str]] = {}
    for path, module in model.named_modules():
        asked = {name: keys[tensor] for name, tensor in own_weights(module).items() if tensor in keys}
        if asked and not isinstance(module, nn.ParameterDict | nn.ParameterList):
            owners[path] = asked
    seen = observe(model, owners, losses)
    return _Planner(model, owners, seen, distrusted).plan()


class _Planner:
    """Turns what was seen into sites."""

    def __init__(
        self,
        model: nn.Module,
        owners: Mapping[str, Mapping[str, str]],
        seen: Mapping[nn.Module, Seen],
        distrusted: Collection[str],
    ) -> None:
        self._modules = dict(model.named_modules())
        self._distrusted = distrusted
        self._owners = owners
        self._seen = seen

    def plan(self) -> Plan:
        sites: list[Site] = []
        hosts: dict[str, dict[str, str]] = defaultdict(dict)
        loop: dict[str, str] = {}
        owners = self._owners_of_each_key()
        for path, asked in self._owners.items():
            asked = {name: key for name, key in asked.items() if path in owners[key]}
            found = self._by_rule(path, asked)
            sites += found
            served = {key for site in found for key in site.keys.values()}
            for name, key in asked.items():
                if key in served or (len(owners[key]) > 1 and not self._calls(path)):
                    continue
                if len(owners[key]) > 1:
                    loop[key] = f"several modules share it, and {path} has no rule for it"
                elif (host := self._host(path)) is not None:
                    hosts[host][f"{path}.{name}".removeprefix(f"{host}.")] = key
                else:
                    loop[key] = self._why_no_host(path)
        sites += [self._generic_site(path, asked) for path, asked in hosts.items()]
        calls = {key: sum(len(self._calls(path)) for path in paths) for key, paths in owners.items()}
        reused = frozenset(key for key, count in calls.items() if count != 1)
        return Plan(tuple(sites), {}, reused).with_loop(loop)

    def _owners_of_each_key(self) -> dict[str, list[str]]:
        """List the paths of the modules that own each parameter.

        A module that merely registers what a module inside it uses (the bias of BERT's prediction head, which is its
        decoder's) does not count; the self-check finds it where that is not so.

        Returns:
            Paths by canonical name.
        """
        owners: dict[str, list[str]] = defaultdict(list)
        for path, asked in self._owners.items():
            for key in asked.values():
                owners[key].append(path)
        for paths in owners.values():
            inner = [path for path in paths if self._calls(path)]
            paths[:] = [path for path in paths if not any(_is_inside(other, path) for other in inner)]
        return owners

    def _calls(self, path: str) -> list[tuple[FrozenCall, Any]]:
        seen = self._seen.get(self._modules[path])
        return seen.calls if seen else []

    def _by_rule(self, path: str, asked: Mapping[str, str]) -> list[Site]:
        """Sites of the rules that serve some of a module's parameters, if its layout can be told."""
        module = self._modules[path]
        seen = self._seen.get(module)
        if seen is None or path in self._distrusted:
            return []
        layout, settled = self._layout(seen)
        picked = layout is Layout.FLATTENED or (layout is Layout.BATCHED and _are_picked(seen))
        if layout is None or (picked and len(seen.calls) > 1):
            return []
        sites = []
        left = dict(asked)
        for layer in LAYERS:
            names = layer.covers(module) & left.keys()
            if names and (names := layer.confirms(*_two_examples(seen), names)):
                keys = {name: left.pop(name) for name in sorted(names)}
                sites.append(Site(path, module, layer, keys, layout if settled else None, seen.block, picked=picked))
        return sites

    @staticmethod
    def _layout(seen: Seen) -> tuple[Layout | None, bool]:
        """Find the layout that fits every call, and whether a gradient has shown it."""
        shown = [entry for entry in seen.touched if len(entry[3])]
        calls = seen.with_gradient or set(range(len(seen.calls)))
        outputs = [seen.calls[call][1] for call in sorted(calls)]
        if not all(isinstance(output, Tensor) and output.ndim for output in outputs):
            return None, False
        rows = {output.shape[0] for output in outputs}
        lengths = {seen.lengths[call] for call in calls}
        if rows == {2} and all(bool((touched == example).all()) for _, example, _, touched in shown):
            inputs = {leading_shape((call.tensors,)) for call, _ in (seen.calls[call] for call in sorted(calls))}
            once_for_all = {shape[0] for shape in inputs if shape} == {1}
            return (Layout.SHARED if once_for_all else Layout.BATCHED), bool(shown)
        if len(rows) == len(lengths) == 1 and None not in lengths:
            (length,) = lengths
            if rows == {2 * length} and all(
                bool((touched // length == example).all()) for _, example, _, touched in shown
            ):
                return Layout.FLATTENED, bool(shown)
        return None, False

    def _host(self, path: str) -> str | None:
        """Find the smallest module around it, below the root, that keeps the examples apart."""
        return next((host for host in upwards(path) if host and self._keeps_examples(self._modules[host])), None)

    def _why_no_host(self, path: str) -> str:
        """Say why the loop is left, and the way round it for modules of torch that hand all weights to one function."""
        reason = "no module below the whole model keeps its examples apart"
        around = (self._modules[at] for at in upwards(path))
        module = next((one for one in around if isinstance(one, nn.RNNBase | nn.MultiheadAttention)), None)
        if module is None or (module.batch_first and not isinstance(module, nn.RNNBase)):
            return reason
        has, ways = "also returns its last state, whose examples are", []
        if not module.batch_first:
            has, ways = "has its examples", ["make it with batch_first=True"]
        if isinstance(module, nn.RNNBase):
            ways.append("put it into a module that returns its output alone")
        return f"{reason} ({type(module).__name__} {has} along the second axis: {' and '.join(ways)})"

    def _keeps_examples(self, module: nn.Module) -> bool:
        seen = self._seen.get(module)
        if seen is None or len({call for call, example, _, _ in seen.touched if example == 0}) != 1:
            return False
        if _are_picked(seen):
            return False
        shown = [entry for entry in seen.touched if len(entry[3])]
        apart = all(rows == 2 and bool((touched == example).all()) for _, example, rows, touched in shown)
        return bool(shown) and apart and same_rows_alone(*_two_examples(seen))

    def _generic_site(self, path: str, asked: Mapping[str, str]) -> Site:
        call, _ = _two_examples(self._seen[self._modules[path]])
        sliced = tuple(has_example_axis(tensor) for tensor in tensors_of(call))
        return Site(path, self._modules[path], None, dict(asked), Layout.BATCHED, sliced=sliced)


def _are_picked(seen: Seen) -> bool:
    """Tell whether a module gets rows ``[2, features]`` inside a module that got ``[2, T, ...]``."""
    call, output = seen.calls[-1]
    rows = next((tensor for tensor in call.tensors if tensor.ndim), None)
    inside = isinstance(output, Tensor) and output.ndim == 2 and (seen.lengths[-1] or 1) > 1
    return inside and rows is not None and rows.ndim == 2 and rows.is_floating_point()


def _two_examples(seen: Seen) -> tuple[Call, Any]:
    """Take the last call that a gradient reached, or the last one."""
    call, output = seen.calls[max(seen.with_gradient, default=len(seen.calls) - 1)]
    return call.thaw(call.tensors), output


def _is_inside(path: str, other: str) -> bool:
    return path != other and (not other or path.startswith(f"{other}."))
