"""The base of masked optimizers: torch's, but only selected entries move and have state."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fishkern import backend, hosts
from fishkern.arguments import one_of
from fishkern.files import is_sharded
from fishkern.hosts import Share
from fishkern.names import listed
from fishkern.optim.clipping import clipped
from fishkern.optim.compact import Bucket, Operands, apart, bytes_of, carried_over
from fishkern.optim.data_parallel import check_under_ddp
from fishkern.optim.frozen import FROZEN, frozen_in, set_frozen_, to_freeze
from fishkern.optim.fused import FusedOperands, step_fused
from fishkern.optim.groups import OUTSIDE, Group, Outside, Parameters, all_named, named_groups, settle
from fishkern.optim.release import ReleasedGrads, dense, several_processes, to_release
from fishkern.optim.selected import Selected, key_bytes
from fishkern.optim.state_dict import loaded, loaded_frozen, whole_state
from fishkern.selection import Entries, Selection, check_start
from fishkern.selection.agreement import check_on_shards, together_on_shards
from fishkern.selection.local import own_entries
from fishkern.selection.result import check_selection
from fishkern.statistics.shards import Ranks
from fishkern.warning import warn_caller


class Reselected(NamedTuple):
    """How many entries of the pool :meth:`MaskedOptimizer.reselect` kept, dropped and added."""

    kept: int
    dropped: int
    added: int


class _Kind(NamedTuple):
    """What the parameters of one bucket have in common."""

    dtype: torch.dtype
    device: torch.device
    long_indices: bool
    fused: bool
    has_starts: bool


class MaskedOptimizer(torch.optim.Optimizer):
    """Moves the selected entries of its parameters, and nothing else.

    A real :class:`torch.optim.Optimizer`: parameter groups with their own ``lr`` and ``weight_decay``, schedulers,
    closures, hooks, ``state_dict``, pickling, :class:`torch.amp.GradScaler`, gradient accumulation. A parameter in the
    selection's pool moves at its selected entries only: elsewhere there is no decay, no momentum and no state. One of
    which nothing is selected never moves.

    State is compact: ``state[parameter]`` holds the keys of torch's optimizer with one number for each selected entry
    (``[K]``, ascending); also ``"indices"`` or ``"rows"``, which entries these are, ``"master"``, and after
    :meth:`reselect` ``"start"``, the step count when an entry was added. A state is loaded by the parameters' names,
    nothing in it is cast, and one of other entries is refused.

    Ranges of rows (:class:`fishkern.Rows`) of a contiguous parameter are stepped in place, as views of parameter,
    gradient and state, by torch's own fused update. That of 16-bit weights needs a master, and a parameter to which
    :meth:`reselect` adds rows is not fused while its entries differ in age. All other entries, ranges of columns among
    them, are gathered by their indices, updated in the order of torch's loop or by a Triton kernel, and scattered. The
    two ways round differently; ``fused=False`` takes the latter for all, and so does ``use_backend("triton")`` unless
    ``fused=True``.

    With ``master_weights`` the selected entries of 16-bit parameters are also kept in float32, with state in float32,
    and rounded into the parameter at each step: this is the float32 optimizer, rounded. Without it, updates are applied
    to 16-bit weights, and small steps are lost. Where a weight is not its master rounded, it was changed elsewhere, as
    by loading a checkpoint, and the step goes on from the weight.

    Released gradients are gathered at the selected entries as soon as backward has accumulated them, in float32, and
    ``.grad`` is set to ``None``, so dense gradients do not pile up. They add up over backward passes until ``step``
    takes them or :meth:`zero_grad` drops them (``model.zero_grad()`` cannot). ``clip_grad_norm_`` and a ``GradScaler``
    do not see them, hence ``max_grad_norm``; the first step without it warns.

    Where FSDP2 shards the parameters, each rank steps the selected entries of its shards and keeps state of these
    alone, in :attr:`state` by their place in the shard. The norm of ``max_grad_norm`` is that over all ranks. Making
    the optimizer, ``step``, :meth:`state_dict`, :meth:`load_state_dict` and :meth:`reselect` are collective operations
    then: every rank calls them. Gradients are not released, since FSDP2 itself reduces and frees them.

    ``torch.compile`` runs ``step`` as it is, uncompiled.

    Args:
        model_or_named_parameters: A model, its ``named_parameters()``, or groups of them.
        selection: What moves. Each name of its pool must be among the parameters. On shards it is either the same on
            all ranks, or a :class:`fishkern.ShardedSelection` of the same parts.
        defaults: Options of the algorithm, for groups that do not set them.
        outside: What to do with trainable parameters outside the pool: ``"error"`` raises, ``"freeze"`` sets their
            ``requires_grad`` to False, ``"train"`` trains them whole.
        master_weights: See above.
        max_grad_norm: Scale the gradients of each step down to this norm over all entries that move, as
            ``clip_grad_norm_`` does over whole gradients; on the device. The norm is left in :attr:`grad_norm`.
        release_grads: ``True`` releases the gradient of every parameter that is not selected whole, ``None`` of those
            with more than a million entries of which at most one in ten is selected (base weights, not adapters).
        fused: What torch's fused update steps: ``None`` ranges of rows; ``True`` also parameters that move whole (other
            entries are still gathered); ``False`` nothing, and rows step to the same bits as a list of their entries.

    Attributes:
        fused_on: Types of device on which torch's fused update runs; on others nothing is fused.

    Raises:
        TypeError: A parameter has no name, or what is given is no selection.
        ValueError: Selection and parameters do not fit, a trainable parameter is outside the pool, a selected one is
            frozen, nothing would move, or an option is out of range.
        UnsupportedModuleError: A model is given that, as it is, does not see PEFT's prefix, or is sharded by other
            means than FSDP2; or the selection's pool holds a quantised weight.
        RuntimeError: Ranks that shard the parameters have different selections.
    """

    fused_on: ClassVar[tuple[str, ...]] = ()
    grad_norm: Tensor | None
    """Norm of the gradients of the last step before clipping, zero-dimensional; ``None`` without ``max_grad_norm``."""
    _warned = False
    _agreed = False  # whether this selection is known to be that of all ranks under DDP
    _expected: Sequence[tuple[str, Tensor]] = ()  # who got gradients before others were frozen, until the next step

    def __init__(
        self,
        model_or_named_parameters: Parameters,
        selection: Selection,
        defaults: dict[str, Any],
        *,
        outside: Outside = "error",
        master_weights: bool = True,
        max_grad_norm: float | None = None,
        release_grads: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        one_of(outside, OUTSIDE, "outside")
        check_selection(selection)
        self._check_options(defaults)
        self.selection, self.grad_norm, self._at_start = selection, None, True
        self._settings: dict[str, Any] = {
            "outside": outside,
            "master_weights": master_weights,
            "release_grads": release_grads,
            "fused": fused,
        }
        self.max_grad_norm = max_grad_norm
        groups = named_groups(model_or_named_parameters, selection)
        parameters = [parameter for _, parameter in all_named(groups)]
        check_on_shards(selection, parameters)
        self._released: ReleasedGrads | None = None
        self._memo: dict[str, Selected] = {}  # of what _selected gives, by name
        with together_on_shards(parameters):
            selection.check(all_named(groups))
            groups = settle(groups, selection, outside)
            counts = selection.counts
            if not any(counts.get(name, parameter.numel()) for name, parameter in all_named(groups)):
                raise ValueError(
                    "nothing would move: the selection selects no entry, and nothing is trained outside it."
                )
            super().__init__(groups, defaults)
            self._attach()

    @property
    def max_grad_norm(self) -> float | None:
        """The norm that gradients are scaled down to, over all entries that move; ``None``: they are not."""
        return self._settings["max_grad_norm"]

    @max_grad_norm.setter
    def max_grad_norm(self, norm: float | None) -> None:
        if norm is not None and not norm > 0:
            raise ValueError(f"max_grad_norm must be above 0 (math.inf: no clipping), got {norm}.")
        self._settings["max_grad_norm"] = norm

    def __repr__(self) -> str:
        options = {
            key: [group.get(key) for group in self.param_groups]
            for key in self.defaults
            if any(key in group for group in self.param_groups)
        }
        shown = (
            f"{key}={values[0] if all(value is values[0] or value == values[0] for value in values) else values}"
            for key, values in options.items()
        )
        parts = [
            f"{self.selection.count:,} of {self.selection.total:,} entries",
            f"{sum(len(group['params']) for group in self.param_groups)} parameters",
            *([f"{len(self.param_groups)} groups"] if len(self.param_groups) > 1 else []),
        ]
        return f"{type(self).__name__}({', '.join([*parts, *shown])})"

    def _check_options(self, options: dict[str, Any]) -> None:
        """Refuse options of a group that are out of range."""
        if isinstance(lr := options["lr"], Tensor) and lr.ndim:
            raise ValueError(
                f"lr must be one number or a zero-dimensional tensor, got {tuple(lr.shape)}: give parameters with "
                "another one a group of their own."
            )

    @abstractmethod
    def _names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Name the numbers that are kept for each selected entry with the options of this group."""
        raise NotImplementedError(f"{type(self).__name__} does not say by _names(group) what it keeps: () is nothing.")

    @abstractmethod
    def _update_(self, bucket: Bucket, operands: Operands, group: dict[str, Any], scale: Tensor | None) -> None:
        """Run the operation on the state of a bucket, whose steps are already counted."""
        raise NotImplementedError(f"{type(self).__name__} does not say by _update_ how a selected entry moves.")

    def _update_fused_(self, operands: FusedOperands, *, group: dict[str, Any], first: bool) -> None:
        """Run torch's fused update; called on the devices of :attr:`fused_on` alone."""
        raise NotImplementedError

    @torch._disable_dynamo  # it makes and replaces state; torch.compile breaks the graph here and runs it as it is
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Do one step.

        Args:
            closure: Computes the loss and the gradients again.

        Returns:
            The closure's loss, or ``None``.

        Raises:
            RuntimeError: A ``GradScaler`` calls, or several processes train, while gradients are released; or ranks
                whose gradients ``DistributedDataParallel`` joins have different selections.
            ValueError: A gradient is sparse; or, at the first step, the selection was bound to other values than the
                parameters have, or were trained from (:func:`fishkern.selection.bound_to_start`).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_released()
        if self._at_start and not self.state:  # the first step, and no state was loaded
            check_start(self.selection, self._named(), trained=True)
        if not self._agreed:
            check_under_ddp(self.selection, [parameter for _, parameter in self._named()])
            self._agreed = True
        if self._at_start:
            self._warn_of_replaced()
        self._at_start = False
        self._warn_of_clipping()
        self._warn_of_missing()
        work = [
            (bucket, group, self._grads_of(bucket.parameters))
            for group, buckets in zip(self.param_groups, self._current_buckets(), strict=True)
            for bucket in buckets
        ]
        scale = None
        if self._settings["max_grad_norm"] not in (None, math.inf):
            work, norm, scale = clipped(work, self._settings["max_grad_norm"])
            self.grad_norm = self.grad_norm if norm is None else norm
        for bucket, group, grads in work:
            if all(grad is None for grad in grads):
                continue
            bucket.own(self.state, grads)
            bucket.advance(grads)
            if not bucket.count:  # the selected entries are in the shards of other ranks
                continue
            factor = None if scale is None else scale.to(bucket.device)
            if self._is_fused(bucket):
                step_fused(bucket, grads, factor, partial(self._update_fused_, group=group))
            else:
                self._update_(bucket, bucket.operands(grads), group, factor)
        if self._released is not None:
            self._released.grads.clear()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, those that were released included.

        Args:
            set_to_none: Whether ``.grad`` becomes ``None`` or zeros.
        """
        super().zero_grad(set_to_none)
        if self._released is not None:
            self._released.grads.clear()

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of named parameters.

        Args:
            param_group: ``{"params": [(name, parameter), ...], ...}`` with options of its own.
        """
        self._check_options({**self.defaults, **param_group})
        (group,) = settle(named_groups([param_group], self.selection), self.selection, self._settings["outside"])
        if not group["params"]:
            group["param_names"] = []  # torch forgets that an empty group has names
        group.setdefault(FROZEN, [])
        super().add_param_group(group)
        self._buckets: list[list[Bucket]] | None = None

    def reselect(self, selection: Selection, *, freeze: bool = False) -> Reselected:
        """Go on with another selection out of the same pool.

        Entries that stay keep their state; others lose theirs, memory included, and their weights stay as they are,
        from this call on; entries that are added begin with a state and a step count of their own.

        With ``freeze`` a parameter of the pool without any selected entry also loses ``requires_grad`` and ``.grad``:
        its gradient is no longer computed, nor what is only needed for gradients at or below it. It requires a gradient
        again as soon as something of it is selected, if it was this optimizer that froze it (:attr:`frozen`).

        Args:
            selection: What moves from now on.
            freeze: See above. Without it, what is frozen already stays so.

        Returns:
            How many entries of the pool were kept, dropped and added.

        Raises:
            RuntimeError: Released gradients of the old entries wait for a step, or ``DistributedDataParallel`` was
                built without ``find_unused_parameters`` and would wait for the gradients of frozen parameters; or ranks
                that shard the parameters have different selections.
            ValueError: The pool is another one, the selection selects from a parameter that somebody else froze, or
                nothing would require a gradient any more.
        """
        check_selection(selection)
        if self._released is not None and self._released.grads:
            raise RuntimeError("released gradients wait for a step: call reselect after step() or zero_grad().")
        check_on_shards(selection, (parameter for _, parameter in self._named()))
        if selection.shapes != self.selection.shapes:
            raise ValueError(
                "reselect takes a selection out of the same pool, with the same names and shapes: select again from "
                "statistics of the same parameters, or make another optimizer."
            )
        before = self.frozen
        with together_on_shards(parameter for _, parameter in self._named()):
            selection.check(self._named())
            groups = [{"params": list(zip(g["param_names"], g["params"], strict=True))} for g in self.param_groups]
            settle(groups, selection, "train", frozen=before)  # which only checks: the rest was settled before
            if freeze and not selection.count and all(name in selection for name, _ in self._named()):
                raise ValueError("nothing would be trained any more: keep an entry selected, or stop training.")
            set_frozen_(self.param_groups, to_freeze(self._named(), selection, before, freeze=freeze))
        if set(self.frozen) - set(before):
            self._expected = [(name, p) for name, p in self._named() if name not in self.frozen and p in self.state]
        kept = 0
        counts = selection.counts
        for name, parameter in self._named():
            if name in selection:
                new, (old, _) = self._reached(selection, name, parameter), self._own(self.selection, name, parameter)
                staying = old.shared(new.entries)
                if new.share is not None:
                    staying = int(new.share.gathered(torch.tensor([staying])).sum())
                kept += staying
                state, local = self.state.pop(parameter, {}), hosts.local_part(parameter.detach())
                added = counts[name] - staying
                if moved := carried_over(state, old, new, local, staying=staying, added=added):
                    self.state[parameter] = moved
            elif parameter in self.state:  # its views would keep the memory of all others
                self.state[parameter] = apart(self.state[parameter])
        reselected = Reselected(kept, self.selection.count - kept, selection.count - kept)
        self.selection, self._at_start, self._agreed = selection, False, False
        self._attach()
        return reselected

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of the parameters that :meth:`reselect` has frozen: no product computes their gradients any more."""
        return frozen_in(self.param_groups)

    @property
    def state_bytes(self) -> int:
        """Memory of the state, in bytes: moments, masters, steps and indices; memory that is shared counts once."""
        own = [value for held in self.state.values() for value in held.values() if isinstance(value, Tensor)]
        buckets = [bucket for buckets in self._buckets or () for bucket in buckets]
        return bytes_of([*own, *(tensor for bucket in buckets for tensor in bucket.tensors())])

    def state_bytes_under(self, selection: Selection) -> int:
        """Compute what :attr:`state_bytes` would be under a selection, with gradients of all of it.

        Args:
            selection: Out of the pool; of entries that move already.

        Returns:
            Bytes after the next step, before the first one, too.
        """
        nbytes = 0
        for group in self.param_groups:
            numbers = len(self._names(group))
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                (entries, _), local = self._own(selection, name, parameter), hosts.local_part(parameter.detach())
                if not _moving(selection.counts, name, parameter):
                    continue
                master = self._has_master(parameter.dtype)
                each = 4 * (numbers + 1) if master else numbers * parameter.dtype.itemsize
                each += 4 * ("start" in self.state.get(parameter, {}))
                nbytes += entries.count * each + 4 + key_bytes(entries, local, with_master=master)  # 4 of the step
        return nbytes

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """Give the state and the options of the groups, as torch's optimizers do.

        Where parameters are sharded this is a collective operation: every rank gets the state of all selected entries,
        in the numbering of whole parameters, which is that of one process and loads on any number of ranks.

        Returns:
            ``"state"`` by number of the parameter, ``"param_groups"``.
        """
        own = self.state
        selected = {name: self._selected(name, parameter) for name, parameter in self._named()}
        self.state = whole_state(own, dict(self._named()), selected, self.selection)
        try:
            return super().state_dict()
        finally:
            self.state = own

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, for the same selection, by the parameters' names; nothing is cast.

        Where parameters are sharded every rank calls it, and takes the entries that it holds.

        Args:
            state_dict: Of an optimizer of this class, on any number of ranks.

        Raises:
            ValueError: Its groups, names or entries differ.
            RuntimeError: They differ on another rank alone.
        """
        state_dict = dict(state_dict) if isinstance(state_dict, Mapping) else state_dict
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        selected = {name: self._selected(name, parameter) for name, parameter in self._named()}
        sharded = any(one.share is not None for one in selected.values())
        with Ranks().failing_together() if sharded else nullcontext():
            state, groups = loaded(state_dict, self.param_groups, selected)
            frozen = loaded_frozen(state_dict, self.selection)
        before = set(self.frozen)
        set_frozen_(groups, frozen)
        self.__setstate__({"state": state, "param_groups": groups})
        if set(self.frozen) != before:
            self._attach()  # what is frozen has no gradient to release
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def close(self) -> None:
        """Take off the hooks that release gradients, if there are any; from then on gradients stay in ``.grad``."""
        self._step_supports_amp_scaling = False
        if self._released is not None:
            self._released.close()
            self._released = None

    def __getstate__(self) -> dict[str, Any]:
        # A view would bring the memory of all others along.
        state = {parameter: apart(held) for parameter, held in self.state.items()}
        own = {"selection": self.selection, "_settings": self._settings}
        return {**super().__getstate__(), "state": defaultdict(dict, state), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._buckets = None
        if "_settings" in state:  # a copy, or from a pickle
            self._settings.setdefault("fused", None)  # of a version without the option
            self.grad_norm, self._released, self._at_start = None, None, not self.state
            self._attach()

    def _current_buckets(self) -> list[list[Bucket]]:
        """For each group its buckets: the parameters with selected entries, by dtype and device."""
        if self._buckets is not None and all(bucket.fits() for buckets in self._buckets for bucket in buckets):
            return self._buckets
        self._buckets = []
        counts = self.selection.counts
        for group in self.param_groups:
            parts: dict[_Kind, list[tuple[Tensor, Selected]]] = defaultdict(list)
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                selected = self._selected(name, parameter)
                if _moving(counts, name, parameter):  # maybe on other ranks alone: the state of all has the same keys
                    parts[self._kind_of(parameter, selected)].append((parameter, selected))
            self._buckets.append(
                [
                    Bucket(
                        *zip(*members, strict=True),
                        self._names(group),
                        with_master=self._has_master(kind.dtype),
                        fused=kind.fused,
                    )
                    for kind, members in parts.items()
                ]
            )
        return self._buckets

    def _has_master(self, dtype: torch.dtype) -> bool:
        return self._settings["master_weights"] and dtype.itemsize < 4

    def _kind_of(self, parameter: Tensor, selected: Selected) -> _Kind:
        requested = self._settings["fused"]
        as_rows = selected.entries.ranges is not None  # ranges of every row, too; a parameter selected whole has none
        local = hosts.local_part(parameter.detach())
        in_place = selected.indices is None and local.is_contiguous() and selected.entries.count > 0
        return _Kind(
            dtype=parameter.dtype,
            device=parameter.device,
            long_indices=selected.indices is not None and selected.indices.dtype == torch.int64,
            fused=(as_rows if requested is None else requested) and in_place and local.device.type in self.fused_on,
            has_starts="start" in self.state.get(parameter, {}),
        )

    def _is_fused(self, bucket: Bucket) -> bool:
        """Tell whether torch's fused update steps a bucket. It has one step count for a tensor, hence no starts."""
        demands_kernel = backend.current() == "triton" and self._settings["fused"] is None
        return bucket.fused and bucket.starts is None and not demands_kernel

    def _grads_of(self, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        grads = [parameter.grad for parameter in parameters]
        for number, (parameter, grad) in enumerate(zip(parameters, grads, strict=True)):
            if grad is None:
                continue
            if type(grad) is not Tensor:
                self._check_placed(parameter, grad)
                grads[number] = grad = hosts.own_part(grad, parameter)
            if grad.layout is not torch.strided:
                dense(self._name_of(parameter), grad)
        if self._released is None or not self._released.grads:
            return grads
        return [self._released.grads.get(p, grad) for p, grad in zip(parameters, grads, strict=True)]

    def _check_placed(self, parameter: Tensor, grad: Tensor) -> None:
        """Refuse a gradient on other ranks than the parameter.

        On the same ones it may be placed otherwise: tensor parallel leaves each rank a summand of the gradient of a
        norm that runs on some positions, and the whole gradient of a weight of one row.

        Raises:
            ValueError: It is on others.
        """
        ours, theirs = (getattr(one, "device_mesh", None) for one in (parameter, grad))
        if ours != theirs:
            raise ValueError(
                f"{self._name_of(parameter)} is sharded over {ours} and its gradient over {theirs}: both must be over "
                "the same ranks, as under FSDP2 and tensor parallel."
            )

    def _name_of(self, parameter: Tensor) -> str:
        return next(name for name, other in self._named() if other is parameter)

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for group in self.param_groups:
            yield from zip(group["param_names"], group["params"], strict=True)

    def _selected(self, name: str, parameter: Tensor) -> Selected:
        """Tell which entries of a parameter move; outside the pool it moves whole."""
        local, selected = hosts.local_part(parameter.detach()), self._memo.get(name)
        alike = selected is not None and (selected.share is None) is not hasattr(parameter, "device_mesh")
        if not alike or not selected.fits(local, with_master=self._has_master(parameter.dtype)):
            selected = self._memo[name] = self._reached(self.selection, name, parameter)
        return selected

    def _reached(self, selection: Selection, name: str, parameter: Tensor) -> Selected:
        entries, share = self._own(selection, name, parameter)
        local = hosts.local_part(parameter.detach())
        return Selected.of(entries, local, share, with_master=self._has_master(parameter.dtype))

    def _own(self, selection: Selection, name: str, parameter: Tensor) -> tuple[Entries, Share | None]:
        """Give the selected entries of a parameter, of a sharded one those of the local shard, by their place in it."""
        if name not in selection:
            return Entries.all(hosts.local_part(parameter.detach()).shape), hosts.share_of(name, parameter)
        return own_entries(selection, name, parameter)

    def _attach(self) -> None:
        """Put on the hooks of this selection, and forget how the state was laid out."""
        self.close()
        self._buckets = None
        self._memo = {}
        moving = [(name, parameter, self._selected(name, parameter)) for name, parameter in self._named()]
        released = to_release(moving, self._settings["release_grads"])
        if released:
            self._released = ReleasedGrads(self, released)
        # Makes a GradScaler hand over to step(), which refuses it, instead of failing without saying why.
        self._step_supports_amp_scaling = bool(released)

    def _warn_of_clipping(self) -> None:
        """Say, once and only when a step would go unclipped, that ``clip_grad_norm_`` has missed gradients."""
        if self._released is None or not self._released.grads or self.max_grad_norm is not None or self._warned:
            return
        self._warned = True
        warn_caller(
            f"the gradients of {self._released.count} parameters are released during backward, so that "
            "clip_grad_norm_ does not see them: clip with max_grad_norm= (math.inf for no clipping), or keep the "
            "gradients with release_grads=False."
        )

    def _warn_of_replaced(self) -> None:
        """Say at the first step that FSDP2 trains other parameters, where of whole ones none has a gradient."""
        if not several_processes():
            return
        counts = self.selection.counts
        whole = [(n, p) for n, p in self._named() if not is_sharded(p) and p.requires_grad and _moving(counts, n, p)]
        if whole and all(grad is None for grad in self._grads_of([parameter for _, parameter in whole])):
            warn_caller(
                f"{len(whole)} parameters of the optimizer ({listed(n for n, _ in whole)}) are whole on this rank, and "
                "none of them has a gradient at the first step. FSDP2 trains others in their place: make the optimizer "
                "after fully_shard, with the model itself. If nothing shards them, call backward before step."
            )

    def _warn_of_missing(self) -> None:
        """Say that parameters got no gradient in the first backward pass after others were frozen."""
        expected, self._expected = self._expected, ()
        grads = self._grads_of([parameter for _, parameter in expected])
        lost = [name for (name, _), grad in zip(expected, grads, strict=True) if grad is None]
        if lost and len(lost) < len(expected):  # else there was no backward pass at all
            warn_caller(
                f"{len(lost)} parameters with selected entries got no gradient after others were frozen "
                f"({listed(lost)}). Reentrant activation checkpointing gives none to a segment whose inputs require "
                "none: checkpoint with use_reentrant=False, or call model.enable_input_require_grads(). Parameters "
                "that this batch did not use need nothing."
            )

    def _check_released(self) -> None:
        if self._released is None:
            return
        if hasattr(self, "found_inf"):  # set by GradScaler.step
            del self.found_inf, self.grad_scale
            raise RuntimeError(
                "a GradScaler cannot check gradients that are released during backward: make the optimizer with "
                "release_grads=False, or train in bfloat16 without a scaler."
            )
        self._released.check_exchanged()


def _moving(counts: Mapping[str, int], name: str, parameter: Tensor) -> bool:
    """Tell whether any entry of a parameter moves, on whatever rank; outside the pool it moves whole."""
    return counts.get(name, parameter.numel()) > 0
