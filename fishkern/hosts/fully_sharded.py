"""Models that FSDP2 (``torch.distributed.fsdp.fully_shard``) shards: their units, as fishkern needs them.

A unit is a module that ``fully_shard`` was called on. Outside of its forward and backward pass its parameters are
shards, ``DTensor``; gathering them is a collective operation, which every rank does in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

_ACCUMULATING = (
    "{0} is in the middle of gradient accumulation without synchronisation (set_requires_gradient_sync, "
    "set_is_last_backward), and its gradients are not yet reduced: estimate after the optimizer's step, with "
    "synchronisation on"
)


def units(model: nn.Module) -> dict[str, nn.Module]:
    """List the modules that FSDP2 shards.

    Args:
        model: A module.

    Returns:
        Modules by their paths; empty if FSDP2 shards nothing of it.
    """
    return {path: module for path, module in model.named_modules() if _is_unit(module)}


def reshard(model: nn.Module) -> None:
    """Let every process hold its shards alone, as between training steps: a forward pass alone may leave it whole.

    Args:
        model: A module; one that FSDP2 does not shard is left as it is.
    """
    if units(model):
        FullySharded(model).reshard()


def class_of(module: nn.Module) -> type[nn.Module]:
    """Give the class that a module was made of, which FSDP2 exchanges for a subclass in its units.

    Args:
        module: A module.

    Returns:
        Its class without what FSDP2 adds.
    """
    if not _is_unit(module):
        return type(module)
    fsdp = next(base for base in type(module).__mro__ if base.__name__ == "FSDPModule")
    return next(base for base in type(module).__mro__ if fsdp not in base.__mro__ and issubclass(base, nn.Module))


def local_part(tensor: Tensor) -> Tensor:
    """Give the part of a tensor that this process holds.

    Args:
        tensor: Any tensor.

    Returns:
        The local shard of a ``DTensor``; any other tensor itself.
    """
    return tensor.to_local() if hasattr(tensor, "device_mesh") else tensor


def runs_on(parameter: Tensor) -> torch.device:
    """Say on which device a parameter's module computes.

    Args:
        parameter: A parameter.

    Returns:
        Its device; that of the processes if FSDP2 offloads its shards to the CPU.
    """
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None or mesh.device_type == parameter.device.type:
        return parameter.device
    return torch.device(mesh.device_type, getattr(torch, mesh.device_type).current_device())


class FullySharded:
    """The units of a model that FSDP2 shards.

    Args:
        model: Without running wrappers; FSDP2 shards some of it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._units = units(model)
        inside = [path for path in self._units if self._is_inside(path)]
        self._top = [unit for path, unit in self._units.items() if path not in inside]
        self._paths = {module: path for path, module in model.named_modules()}
        self._order: list[nn.Module] | None = None
        self._entered: list[nn.Module] = []
        self._following = False
        self._gathered: set[int] = set()

    def parameters(self) -> list[nn.Parameter]:
        """List the sharded parameters.

        Returns:
            Those of all units, each once.
        """
        return [
            one.sharded_param for unit in self._units.values() for group in _groups(unit) for one in group.fsdp_params
        ]

    def reshard(self) -> None:
        """Let every unit hold its shards alone, as between training steps: a forward pass alone may leave it whole."""
        for unit in self._units.values():
            for group in _groups(unit):
                group.reshard()

    def why_not_ready(self) -> str | None:
        """Say why no pass can run now.

        Returns:
            The reason and what to do, or ``None``.
        """
        for path, unit in self._units.items():
            state = unit._get_fsdp_state()
            for group in _groups(unit):
                waiting = any(one.unsharded_accumulated_grad is not None for one in group.fsdp_params)
                waiting |= getattr(group, "_partial_reduce_output", None) is not None
                synchronised = group.reduce_grads and group.all_reduce_grads and state._state_ctx.is_last_backward
                if waiting or not synchronised:
                    return _ACCUMULATING.format(repr(path) if path else "the model")
        return None

    def units_inside(self, module: nn.Module) -> list[str]:
        """List the units inside a module, without itself.

        Args:
            module: A module of the model.

        Returns:
            Their paths.
        """
        inside = set(module.modules()) - {module}
        return [path for path, unit in self._units.items() if unit in inside]

    @contextmanager
    def differentiating(self, parameters: Collection[nn.Parameter]) -> Iterator[None]:
        """Prepare the units for passes with frozen weights, and leave them as found.

        FSDP2 decides at the first forward pass in which dtype it reduces gradients, by the parameters that require one
        then. A first pass with frozen weights would leave that undecided, and later training would fail.

        Args:
            parameters: Those whose gradients autograd forms in between.

        Yields:
            Nothing.
        """
        self.reshard()
        required = {one: one.requires_grad for one in (*self._model.parameters(), *parameters)}
        groups = [group for unit in self._units.values() for group in _groups(unit)]
        factors = [group.gradient_divide_factor for group in groups]
        for unit in self._top:
            unit._get_fsdp_state()._lazy_init()
        try:
            for one in parameters:
                one.requires_grad_(True)
            for group in groups:
                group.gradient_divide_factor = None
                group._init_mp_dtypes()
            for one, before in required.items():
                one.requires_grad_(before)
            yield
        except BaseException:
            for unit in self._top:
                _forget_pass(unit)
            raise
        finally:
            for one, before in required.items():
                one.requires_grad_(before)
            for group, factor in zip(groups, factors, strict=True):
                group.gradient_divide_factor = factor
                group._init_mp_dtypes()
            self.reshard()

    @contextmanager
    def reducing_all(self) -> Iterator[None]:
        """Let FSDP2 reduce what ordinary autograd gives on ranks with batches of their own, in no less than float32.

        A parameter that only the batch of one rank reaches has a gradient there alone; since torch 2.13 the others can
        take part with zeros.

        Yields:
            Nothing.
        """
        groups = [group for unit in self._units.values() for group in _groups(unit)]
        before = [(group._reduce_dtype, getattr(group, "reduce_scatter_unused_params", None)) for group in groups]
        for group in groups:
            group.reduce_scatter_unused_params = True
            if any(one.sharded_param.dtype.itemsize == 2 for one in group.fsdp_params) or group._reduce_dtype:
                group._reduce_dtype = torch.promote_types(group._reduce_dtype or torch.float32, torch.float32)
        try:
            yield
        finally:
            for group, (dtype, unused) in zip(groups, before, strict=True):
                group._reduce_dtype, group.reduce_scatter_unused_params = dtype, unused

    @contextmanager
    def whole(self, module: nn.Module, arguments: Any) -> Iterator[None]:
        """Gather the parameters of a module, so that a call of it can run once more outside of a forward pass.

        A collective operation.

        Args:
            module: A module of the model.
            arguments: Those of the call, in any nest; one may be a parameter of a unit further out, as it is.

        Yields:
            Nothing.
        """
        path = self._paths[module]
        around = [unit for at, unit in self._units.items() if not at or f"{path}.".startswith(f"{at}.")]
        tensors = [one for one in tree_leaves(arguments) if isinstance(one, Tensor)]
        if not any(map(self.is_gathered, tensors)):
            around = around[-1:]  # a module is listed after those around it
        concerned = [*around, *(self._units[at] for at in self.units_inside(module))]
        states = [unit._get_fsdp_state() for unit in concerned]
        before = [state._training_state for state in states]
        try:
            for state, unit in zip(states, concerned, strict=True):
                # as in a recomputation: FSDP2's own hooks then cast, and do nothing else
                state._training_state = type(state._training_state).PRE_BACKWARD
                for group in _groups(unit):
                    group.unshard()
                    group.wait_for_unshard()
            yield
        finally:
            for state, training in zip(states, before, strict=True):
                state._training_state = training
            for unit in concerned:
                for group in _groups(unit):
                    group.reshard()

    @contextmanager
    def watched(self, arrived: Callable[[], None]) -> Iterator[None]:
        """Follow the units through forward passes, and report when a gradient arrives at the output of one.

        Args:
            arrived: Called once for each call of a unit; on every rank at the same point of its backward pass.

        Yields:
            Nothing.
        """

        def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
            if self._following:
                self._entered.append(module)

        def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            outputs = [one for one in tree_leaves(output) if isinstance(one, Tensor) and one.requires_grad]
            told: list[bool] = []

            def tell(grad: Tensor) -> None:
                if not told:
                    told.append(True)
                    arrived()

            for one in outputs if torch.is_grad_enabled() else ():
                one.register_hook(tell)

        handles = [unit.register_forward_pre_hook(enter) for unit in self._units.values()]
        handles += [unit.register_forward_hook(leave) for unit in self._units.values()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._order = None

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Run the model inside the ``with`` block; after an exception, gather what the other ranks still gather.

        They wait in the forward pass for this rank to take part in each unit's collective operation. The order of the
        units is that of the first run.

        Yields:
            Nothing.
        """
        self._entered, self._following = [], True
        try:
            yield
        except Exception:
            self._following = False
            for unit in (self._order or [])[len(self._entered) :]:
                for group in _groups(unit):
                    group._training_state = type(group._training_state).FORWARD  # reshards where a forward pass does
                    group.unshard()
                    group.wait_for_unshard()
                    group.reshard()
            raise
        finally:
            self._following = False
        if self._order is None:
            self._order = self._entered
        self._gathered = {
            one._unsharded_param.untyped_storage()._cdata
            for unit in self._units.values()
            for group in _groups(unit)
            for one in group.fsdp_params
            if hasattr(one, "_unsharded_param")  # of a unit that has run
        }

    def is_gathered(self, tensor: Tensor) -> bool:
        """Tell whether a tensor lies in the memory of a gathered parameter, which FSDP2 frees after the pass.

        Args:
            tensor: An ordinary tensor, such as an input of a module.

        Returns:
            Whether the last run of the model (:meth:`followed`) has gathered its memory.
        """
        return tensor.untyped_storage()._cdata in self._gathered

    def _is_inside(self, path: str) -> bool:
        """Tell whether another unit is around one."""
        return any(path != at and (not at or path.startswith(f"{at}.")) for at in self._units)


def _forget_pass(unit: nn.Module) -> None:
    """Let a unit forget a pass that an exception has ended."""
    if hasattr(unit, "reset_iter_state") and unit._get_fsdp_state()._is_root:  # since torch 2.13
        unit.reset_iter_state()


def _is_unit(module: nn.Module) -> bool:
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)


def _groups(unit: nn.Module) -> list[Any]:
    """List the groups of parameters of a unit, which torch gathers together."""
    state = unit._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [state._fsdp_param_group] if state._fsdp_param_group is not None else []  # torch below 2.13
