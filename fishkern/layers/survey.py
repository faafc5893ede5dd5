"""The survey: which rule serves each parameter, and which rows of each call belong to which example.

Nothing is guessed from shapes. The model runs on two examples, the loss of each is back-propagated alone, and the rows
of a call where the output gradient is not zero are the example's rows. What no rule serves, or whose rows cannot be
told apart, goes to the smallest enclosing module that keeps the example axis, and runs that module once more for each
example; what has none goes to a loop over the whole model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fishkern.layers.base import Call, Layer, own_parameters
from fishkern.layers.capture import FrozenCall, Layout, Site, floating_places, frozen_call, leading_shape, tapped
from fishkern.layers.convolution import Convolution
from fishkern.layers.embedding import Embedding
from fishkern.layers.layer_norm import LayerNorm
from fishkern.layers.linear import Conv1D, Linear, QuantizedLinear
from fishkern.layers.scale import Scale

LAYERS: tuple[Layer, ...] = (Linear(), QuantizedLinear(), Conv1D(), Embedding(), LayerNorm(), Convolution(), Scale())
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
        """Path (``"fused"``, ``"generic"`` or ``"loop"``) and reason for each parameter."""
        paths = {key: ("loop", reason) for key, reason in self.loop.items()}
        for site in self.sites:
            path = ("fused", "") if site.layer else ("generic", f"through {site.path} ({type(site.module).__name__})")
            paths |= {key: path for key in site.keys.values()}
        return paths

    def with_loop(self, reasons: Mapping[str, str]) -> Plan:
        """Send further parameters through the loop.

        Args:
            reasons: Why, by canonical name.

        Returns:
            The changed plan.
        """
        sites = []
        for site in self.sites:
            keys = {name: key for name, key in site.keys.items() if key not in reasons}
            if keys:
                sites.append(replace(site, keys=keys))
        return Plan(tuple(sites), {**self.loop, **reasons}, self.reused)


def survey(
    model: nn.Module,
    keys: Mapping[nn.Parameter, str],
    losses: Callable[[], Tensor],
    distrusted: Collection[str] = (),
) -> Plan:
    """Establish how each parameter is served.

    Args:
        model: In evaluation mode, its weights frozen; left without hooks.
        keys: Canonical name of each parameter asked for.
        losses: Runs the model on two examples and returns their losses, ``[2]``; called two or more times.
        distrusted: Paths of modules whose rows have been seen to follow the data.

    Returns:
        The plan.
    """
    owners: dict[str, dict[str, str]] = {}
    for path, module in model.named_modules():
        asked = {name: keys[parameter] for name, parameter in own_parameters(module).items() if parameter in keys}
        if asked and not isinstance(module, nn.ParameterDict | nn.ParameterList):
            owners[path] = asked
    seen = _observe(model, owners, losses)
    return _Planner(model, owners, seen, distrusted).plan()


@dataclass
class _Seen:
    """What the survey saw of one module."""

    calls: list[tuple[FrozenCall, Any]] = field(default_factory=list)
    touched: list[tuple[int, int, int | None, Tensor]] = field(default_factory=list)  # call, example, T, rows
    lengths: list[int | None] = field(default_factory=list)  # T of the enclosing module's input, for each call
    block: nn.Module | None = None

    @property
    def with_gradient(self) -> set[int]:
        """Calls that a gradient reached."""
        return {call for call, _, _, _ in self.touched}


class _Observer:
    """Hooks that record calls and the rows of their output gradients."""

    def __init__(self, model: nn.Module, observed: Mapping[str, nn.Module], shared: frozenset[nn.Module]) -> None:
        self.seen: dict[nn.Module, _Seen] = defaultdict(_Seen)
        self._paths = {module: path for path, module in observed.items()}
        self._modules = dict(model.named_modules())
        self._shared = shared
        self._inputs: dict[nn.Module, torch.Size] = {}
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
        for self._example in range(2 if losses.requires_grad else 0):
            losses[self._example].backward(retain_graph=self._example == 0)

    def _note_input(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._inputs[module] = leading_shape((args, kwargs))

    def _hook(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        if not torch.is_grad_enabled():
            return None
        if module in self._shared and isinstance(output, Tensor):
            output = output.expand(2, *output.shape[1:])
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
                    rows = grad.reshape(grad.shape[0], -1).ne(0).any(1) if grad.ndim else grad.new_zeros(0)
                    seen.touched.append((index, self._example, grad.shape[0] if grad.ndim else None, rows.nonzero()))

        return tapped(output, self._anchor, receive, call)

    def _enclosing(self, path: str) -> tuple[nn.Module | None, int | None]:
        """The nearest enclosing module whose input is ``[2, T, ...]``, and ``T``."""
        while path:
            path = path.rpartition(".")[0]
            module = self._modules[path]
            shape = self._inputs.get(module, torch.Size())
            if len(shape) > 1 and shape[0] == 2:
                return module, shape[1]
        return None, None


def _observe(
    model: nn.Module, owners: Mapping[str, Mapping[str, str]], losses: Callable[[], Tensor]
) -> dict[nn.Module, _Seen]:
    """Run the survey's forward and backward passes; outputs shared by all examples are expanded where that is right."""
    modules = dict(model.named_modules())
    observed = {path: modules[path] for owner in owners for path in _upwards(owner) if path or owner == ""}
    owning = {modules[path] for path in owners}

    def run(shared: frozenset[nn.Module], backward: bool = True) -> tuple[Tensor, dict[nn.Module, _Seen]]:
        observer = _Observer(model, observed, shared)
        with observer.hooked():
            values = losses()
            if backward:
                observer.backward(values)
        return values.detach(), observer.seen

    expected, seen = run(frozenset())
    candidates = [
        module
        for module, of_module in seen.items()
        if module in owning and all(isinstance(output, Tensor) and output.ndim > 1 and output.shape[0] == 1
                                    for _, output in of_module.calls)
    ]  # fmt: skip
    if not candidates:
        return seen
    shared = [module for module in candidates if _same_losses(run, frozenset({module}), expected)]
    return run(frozenset(shared))[1] if shared else seen


def _same_losses(run: Callable[..., Any], shared: frozenset[nn.Module], expected: Tensor) -> bool:
    try:
        values, _ = run(shared, backward=False)
    except RuntimeError:  # the model needs the axis to be 1
        return False
    return torch.allclose(values, expected, rtol=64 * torch.finfo(expected.dtype).eps, atol=0.0)


class _Planner:
    """Turns what was seen into sites."""

    def __init__(
        self,
        model: nn.Module,
        owners: Mapping[str, Mapping[str, str]],
        seen: Mapping[nn.Module, _Seen],
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
                    loop[key] = "no module below the whole model keeps its examples apart"
        sites += [self._generic_site(path, asked) for path, asked in hosts.items()]
        unsure = {key for site in sites if site.layout is None for key in site.keys.values() if len(owners[key]) > 1}
        loop |= dict.fromkeys(unsure, "several modules share it, and no gradient reaches one of them")
        calls = {key: sum(len(self._calls(path)) for path in paths) for key, paths in owners.items()}
        reused = frozenset(key for key, count in calls.items() if count != 1)
        return Plan(tuple(sites), {}, reused).with_loop(loop)

    def _owners_of_each_key(self) -> dict[str, list[str]]:
        """Paths of the modules that own each parameter.

        A module that merely registers what a module inside it uses (the bias of BERT's prediction head, which is its
        decoder's) does not count; the self-check finds it where that is not so.
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
        picked = layout is Layout.BATCHED and _are_picked(seen)
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
    def _layout(seen: _Seen) -> tuple[Layout | None, bool]:
        """The layout that fits every call, and whether a gradient has shown it."""
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
        """The smallest enclosing module below the root that keeps the example axis and gives the same rows alone."""
        return next((host for host in _upwards(path) if host and self._keeps_examples(self._modules[host])), None)

    def _keeps_examples(self, module: nn.Module) -> bool:
        seen = self._seen.get(module)
        if seen is None or len({call for call, example, _, _ in seen.touched if example == 0}) != 1:
            return False
        shown = [entry for entry in seen.touched if len(entry[3])]
        apart = all(rows == 2 and bool((touched == example).all()) for _, example, rows, touched in shown)
        return bool(shown) and apart and _same_rows_alone(*_two_examples(seen))

    def _generic_site(self, path: str, asked: Mapping[str, str]) -> Site:
        call, _ = _two_examples(self._seen[self._modules[path]])
        sliced = tuple(_has_example_axis(tensor) for tensor in _tensors(call))
        return Site(path, self._modules[path], None, dict(asked), Layout.BATCHED, sliced=sliced)


def _are_picked(seen: _Seen) -> bool:
    """Whether rows ``[2, features]`` come out of a module around it that got ``[2, T, ...]``."""
    output = seen.calls[-1][1]
    return output.ndim == 2 and (seen.lengths[-1] or 1) > 1


def _two_examples(seen: _Seen) -> tuple[Call, Any]:
    """The last call that a gradient reached, or the last one."""
    call, output = seen.calls[max(seen.with_gradient, default=len(seen.calls) - 1)]
    return call.thaw(call.tensors), output


@torch.no_grad()
def _same_rows_alone(call: Call, output: Any) -> bool:
    """Whether the module, run on the rows of one example alone, gives that example's rows."""
    leaves, spec = tree_flatten((call.args, dict(call.kwargs)))
    if any(_is_stateful(leaf) for leaf in leaves):
        return False
    expected, _ = tree_flatten(output)
    for n in range(2):
        row = [leaf[n : n + 1] if isinstance(leaf, Tensor) and _has_example_axis(leaf) else leaf for leaf in leaves]
        args, kwargs = tree_unflatten(row, spec)
        try:
            actual, _ = tree_flatten(Call(call.module, args, kwargs, call.autocast).run())
        except (RuntimeError, ValueError, IndexError):
            return False
        for place in floating_places(expected):
            whole = expected[place]
            if not (whole.ndim and whole.shape[0] == 2 and actual[place].shape == whole[n : n + 1].shape):
                return False
            gap = (actual[place] - whole[n : n + 1]).abs().max()
            if gap > 64 * torch.finfo(whole.dtype).eps * whole.abs().max():
                return False
    return True


def _is_stateful(leaf: Any) -> bool:
    """Whether an argument is an object that a second run would find changed, such as a key-value cache."""
    return leaf is not None and not isinstance(leaf, Tensor | nn.Module | bool | int | float | str | torch.dtype)


def _has_example_axis(tensor: Tensor) -> bool:
    return tensor.ndim > 0 and tensor.shape[0] == 2


def _tensors(call: Call) -> list[Tensor]:
    leaves, _ = tree_flatten((call.args, dict(call.kwargs)))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _detached(output: Any) -> Any:
    leaves, spec = tree_flatten(output)
    return tree_unflatten([leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)


def _is_inside(path: str, other: str) -> bool:
    return path != other and (not other or path.startswith(f"{other}."))


def _upwards(path: str) -> Iterator[str]:
    """A module's path and those of the modules around it, the whole model (``""``) last."""
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""
