"""The survey: which rule serves each parameter, and which rows of each call belong to which example.

Nothing is guessed from shapes. The model runs on two examples, the loss of each is back-propagated alone, and the rows
of a call where the output gradient is not zero are the example's rows. What no rule serves, or whose rows cannot be
told apart, goes to the smallest enclosing module that keeps the example axis, and runs that module once more for each
example; what has none goes to a loop over the whole model. Where the first batch holds one example, the model runs on
that alone, and the plan is one for batches of one.
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
from fishkern.layers.observe import Observation, Seen, observe, upwards
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

    @property
    def with_factors(self) -> frozenset[str]:
        """Parameters whose gradients come as activations and output gradients, by all of their uses."""
        kinds: dict[str, list[bool]] = defaultdict(list)
        for site in self.sites:
            for name, key in site.keys.items():
                kinds[key].append(site.layer is not None and site.layer.gives_factors(name))
        return frozenset(key for key, factors in kinds.items() if all(factors) and key not in self.loop)

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
    answered: Callable[[Callable[[], Any]], Any] = lambda run: run(),
    num_examples: int = 2,
) -> Plan:
    """Establish how each parameter is served.

    Args:
        model: In evaluation mode, its weights frozen; left without hooks.
        keys: Canonical name of each parameter or stored weight asked for.
        losses: Runs the model on two examples, or one, and returns their losses; called once or more times.
        distrusted: Paths of modules whose rows have been seen to follow the data.
        answered: Runs a run of the model (:meth:`fishkern.layers.reentrant.Connection.answered`).
        num_examples: 2; or 1, for a plan that serves batches of one.

    Returns:
        The plan.
    """
    hooked = {key: _HOOKED for parameter, key in keys.items() if parameter._backward_hooks}
    keys = {parameter: key for parameter, key in keys.items() if key not in hooked}
    owners: dict[str, dict[str, str]] = {}
    for path, module in model.named_modules():
        asked = {name: keys[tensor] for name, tensor in own_weights(module).items() if tensor in keys}
        if asked and not isinstance(module, nn.ParameterDict | nn.ParameterList):
            owners[path] = asked
    observation = observe(model, owners, losses, answered, num_examples)
    planner = _Planner(model, owners, observation, distrusted, num_examples)
    plan = planner.plan()
    if planner.rewritten:
        observation.copy(planner.rewritten)
        plan = _Planner(model, owners, observation, distrusted, num_examples).plan()
    return plan.with_loop(hooked)


_BATCH_FIRST = (
    nn.RNNBase, nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.Transformer
)  # fmt: skip
_HOOKED = (
    "a hook on it (register_hook) may change the gradient of each example: without the hook, its layer's rule serves it"
)


class _Planner:
    """Turns what was seen into sites.

    Attributes:
        rewritten: Modules that may keep the examples apart, which cannot be seen any more: the model has written into
            their outputs since.
    """

    def __init__(
        self,
        model: nn.Module,
        owners: Mapping[str, Mapping[str, str]],
        observation: Observation,
        distrusted: Collection[str],
        num_examples: int,
    ) -> None:
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
        self._seen = observation.seen
        self._num_examples = num_examples

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
                if key in served or (len(owners[key]) > 1 and not self._is_called(path)):
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
            inner = [path for path in paths if self._is_called(path)]
            paths[:] = [path for path in paths if not any(_is_inside(other, path) for other in inner)]
        return owners

    def _calls(self, path: str) -> list[tuple[FrozenCall, Any]]:
        seen = self._seen.get(self._modules[path])
        return seen.calls if seen else []

    def _is_called(self, path: str) -> bool:
        seen = self._seen.get(self._modules[path])
        return seen is not None and (bool(seen.calls) or seen.untapped)

    def _by_rule(self, path: str, asked: Mapping[str, str]) -> list[Site]:
        """Sites of the rules that serve some of a module's parameters, if its layout can be told."""
        module = self._modules[path]
        seen = self._seen.get(module)
        if seen is None or seen.writes_input or seen.untapped or path in self._distrusted:
            return []
        layout, settled = self._layout(seen)
        picked = layout is Layout.FLATTENED or (layout is Layout.BATCHED and self._are_picked(seen))
        if layout is None or (picked and len(seen.calls) > 1):
            return []
        sites = []
        left = dict(asked)
        for layer in LAYERS:
            names = layer.covers(module) & left.keys()
            if names and (names := layer.confirms(*_last_call(seen, layer.reruns), names)):
                keys = {name: left.pop(name) for name in sorted(names)}
                told = layout if settled else None
                rewritten = seen.input_rewritten
                sites.append(Site(path, module, layer, keys, told, seen.block, picked=picked, rewritten=rewritten))
        return sites

    def _layout(self, seen: Seen) -> tuple[Layout | None, bool]:
        """Find the layout that fits every call, and whether a gradient has shown it."""
        shown = [entry for entry in seen.touched if len(entry[3])]
        calls = seen.with_gradient or set(range(len(seen.calls)))
        outputs = [seen.calls[call][1] for call in sorted(calls)]
        if not all(isinstance(output, Tensor) and output.ndim for output in outputs):
            return None, False
        rows = {output.shape[0] for output in outputs}
        lengths = {seen.lengths[call] for call in calls}
        N = self._num_examples
        if rows == {N} and all(bool((touched == example).all()) for _, example, _, touched in shown):
            inputs = {leading_shape((call.tensors,)) for call, _ in (seen.calls[call] for call in sorted(calls))}
            once_for_all = N > 1 and {shape[0] for shape in inputs if shape} == {1}
            return (Layout.SHARED if once_for_all else Layout.BATCHED), bool(shown)
        if len(rows) == len(lengths) == 1 and None not in lengths:
            (length,) = lengths
            if rows == {N * length} and all(
                bool((touched // length == example).all()) for _, example, _, touched in shown
            ):
                return Layout.FLATTENED, bool(shown)
        return None, False

    def _host(self, path: str) -> str | None:
        """Find the smallest module around it, below the root, that keeps the examples apart.

        Where several modules share it, that is one around all of them: the first examples need not reach each use.

        Returns:
            Its path, or ``None`` where there is no such module.
        """
        places = self._places[self._modules[path]]
        around = (host for host in upwards(path) if host and all(f"{at}.".startswith(f"{host}.") for at in places))
        return next((host for host in around if self._serves(host, path)), None)

    def _serves(self, host: str, path: str) -> bool:
        """Tell whether a module keeps the examples apart and every call of one inside it lies within its own."""
        module = self._modules[host]
        return host not in self._distrusted and self._encloses(module, path) and self._keeps_examples(module)

    def _encloses(self, module: nn.Module, path: str) -> bool:
        inner = self._modules[path]
        if inner is module:
            return True
        if (around := self._around.get(inner)) is not None:
            return module in around
        # a mere container of parameters, which others read
        paths = [at for at, one in self._by_any_path.items() if one is inner]
        return all(any(self._by_any_path[at] is module for at in upwards(one)) for one in paths)

    def _why_no_host(self, path: str) -> str:
        """Say why the loop is left, and the way round it where there is one."""
        if path in self._distrusted:
            return (
                f"the rows of {path} are not those of the examples, or their number follows the data, or it is called "
                "several times"
            )
        if (seen := self._seen.get(self._modules[path])) is not None and seen.writes_input:
            return f"{path or 'the model'} writes into its input, which others may hold"
        reason = "no module below the whole model keeps its examples apart"
        around = [self._modules[at] for at in upwards(path) if at]
        of_torch = next((one for one in reversed(around) if isinstance(one, _BATCH_FIRST)), None)
        second = [one for one in around if self._has_examples_second(one)]
        has, ways = "also returns its last state, whose examples are", []
        if of_torch is not None and not _is_batch_first(of_torch):
            has, ways = "has its examples", ["make it with batch_first=True"]
        elif second and of_torch is None:
            has, ways = "has its examples", ["put it into a module that takes and returns them along the first"]
        if isinstance(of_torch, nn.RNNBase):
            ways.append("put it into a module that returns its output alone")
        if not ways:
            called = self._modules[path] in self._seen or self._modules[path] in self._around
            return reason if called else f"{path} was not called by the first examples, and {reason}"
        module = of_torch if of_torch is not None else second[-1]
        return f"{reason} ({type(module).__name__} {has} along the second axis: {' and '.join(ways)})"

    def _has_examples_second(self, module: nn.Module) -> bool:
        """Tell whether the gradients at a module have shown its examples along the second axis, ``[T, N, ...]``."""
        seen = self._seen.get(module)
        columns = seen.columns if seen else []
        apart = all(entry is not None and bool((entry[1] == entry[0]).all()) for entry in columns)
        return apart and {entry[0] for entry in columns if len(entry[1])} == {0, 1}

    def _keeps_examples(self, module: nn.Module) -> bool:
        seen = self._seen.get(module)
        if seen is None or len({call for call, example, _, _ in seen.touched if example == 0}) != 1:
            return False
        if seen.untapped or self._are_picked(seen) or seen.writes_input or module in self._checkpointing:
            return False
        shown = [entry for entry in seen.touched if len(entry[3])]
        N = self._num_examples
        apart = all(rows == N and bool((touched == example).all()) for _, example, rows, touched in shown)
        if not shown or not apart:
            return False
        if seen.output_rewritten or (seen.input_rewritten and not seen.was_rewritten):
            self.rewritten.add(module)
            return False
        return same_rows_alone(*_last_call(seen, entered=True), N)

    def _are_picked(self, seen: Seen) -> bool:
        """Tell whether a module gets rows ``[N, features]`` inside a module that got ``[N, T, ...]``, ``N > 1``."""
        if self._num_examples == 1:
            return False
        call, output = seen.calls[-1]
        rows = next((tensor for tensor in call.tensors if tensor.ndim), None)
        inside = isinstance(output, Tensor) and output.ndim == 2 and (seen.lengths[-1] or 1) > 1
        return inside and rows is not None and rows.ndim == 2 and rows.is_floating_point()

    def _generic_site(self, path: str, asked: Mapping[str, str]) -> Site:
        seen = self._seen[self._modules[path]]
        call, _ = _last_call(seen, entered=True)
        sliced = tuple(has_example_axis(tensor, self._num_examples) for tensor in tensors_of(call))
        rewritten = seen.input_rewritten
        return Site(path, self._modules[path], None, dict(asked), Layout.BATCHED, sliced=sliced, rewritten=rewritten)


def _is_batch_first(module: nn.Module) -> bool:
    """Tell how a module of torch was made; those around an attention do not all remember it."""
    inner = (one for one in module.modules() if isinstance(one, nn.RNNBase | nn.MultiheadAttention))
    return all(one.batch_first for one in inner)


def _last_call(seen: Seen, entered: bool) -> tuple[Call, Any]:
    """Take the last call that a gradient reached, or the last one, ahead of the hooks on its input or behind them."""
    place = max(seen.with_gradient, default=len(seen.calls) - 1)
    call, output = seen.calls[place]
    call = seen.entered[place] if entered else call
    return call.thaw(call.tensors), output


def _is_inside(path: str, other: str) -> bool:
    return path != other and (not other or path.startswith(f"{other}."))
