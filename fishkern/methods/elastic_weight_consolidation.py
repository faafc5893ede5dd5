"""Elastic weight consolidation (Kirkpatrick et al., 2017, arXiv:1612.00796), and its online form (arXiv:1805.06370)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from fishkern import hosts
from fishkern.arguments import from_file, positive, share_of
from fishkern.files import pieces
from fishkern.layers import UnsupportedModuleError
from fishkern.names import listed
from fishkern.selection.frozen import Frozen
from fishkern.statistics import Held, Statistics
from fishkern.statistics.merge import check_definitions

_PIECE = 2**24  # entries whose distance is in memory at once
_FOLLOWED = 256  # entries of each parameter that the fingerprint covers
_SUMMED = "decayed_sums"


class QuadraticPenalty(Frozen):
    """A penalty on moving the weights that an earlier task needs, called without arguments.

        penalty() = weight / 2 * sum_p F[p] (w[p] - w0[p])^2

    ``w0`` are the values when the penalty is made, ``w`` those when it is called. Its gradient is
    ``weight * F * (w - w0)``. It keeps one copy of the values; the statistics are those given, not copied where they
    are in memory on the parameter's device, and a call needs a piece of 2^24 entries besides. It is computed in
    float32, and in float64 for a float64 parameter.

    ``F`` is a mean over examples: the sum over the task, which Kirkpatrick et al. write, is in the weight. A parameter
    that requires a gradient and has no statistics, such as a new head, is free.

    Several tasks: the penalties add up. Or online, with one copy and one sum for all of them, as Schwarz et al. have it
    (arXiv:1805.06370): ``after=`` and ``decay=``.

    Args:
        statistics: ``F``, of parameters that require a gradient: statistics, or tensors by parameter name.
        model: The model, with the values to stay near. The penalty holds its parameters, and follows them where they
            are moved to another device.
        weight: Above 0.
        after: The penalty of the tasks before. Then ``F = decay * after's F + statistics``, where a parameter that
            only one of them has counts with that one, and ``w0`` are the present values for all.
        decay: What remains of the tasks before, from 0 to 1; with ``after`` only.

    Raises:
        TypeError: An argument is of another kind, or the statistics are not tensors by parameter.
        ValueError: The statistics are not of this model, of groups, negative or not finite; a parameter of theirs does
            not require a gradient; ``weight`` or ``decay`` is outside its range; ``decay`` is given without ``after``;
            or the statistics of ``after`` are of another definition.
        UnsupportedModuleError: The model's parameters are sharded.
    """

    weight: float

    def __init__(
        self,
        statistics: Statistics | Mapping[str, Tensor],
        model: nn.Module,
        weight: float,
        *,
        after: QuadraticPenalty | None = None,
        decay: float = 1.0,
    ) -> None:
        fisher = _statistics_of(statistics)
        plain = hosts.unwrap(model)
        if reason := hosts.sharded(plain):
            raise UnsupportedModuleError(f"{reason}.")
        weight, decay = positive(weight, "weight"), share_of(decay, "decay")
        if after is None:
            if decay != 1:
                raise ValueError(f"decay={decay:g} is of the tasks before: give their penalty, after=.")
        else:
            if not isinstance(after, QuadraticPenalty):
                raise TypeError(f"after must be the QuadraticPenalty of the tasks before, got {after!r:.80}.")
            fisher = _decayed_sum(after.statistics, fisher, decay)
        named = _penalised(fisher, plain)
        terms = {}
        for name, parameter in named.items():
            values = fisher[name].to(parameter.device)
            _check_values(name, values)
            terms[name] = _Term(parameter, values, parameter.detach().clone())
        kept = {name: term.fisher for name, term in terms.items()}
        kept = Statistics(kept, count=fisher.count, provenance=fisher.provenance, coverage=fisher.coverage)
        vars(self).update(weight=weight, _terms=terms, _statistics=kept)

    def __call__(self) -> Tensor:
        """Compute the penalty at the present values.

        Returns:
            A scalar on the first parameter's device, float32 or wider, to be added to the loss.

        Raises:
            ValueError: A parameter has another shape than when the penalty was made.
        """
        for name, term in self._terms.items():
            if term.parameter.shape != term.anchor.shape:
                raise ValueError(
                    f"{name} is {tuple(term.parameter.shape)} now, and was {tuple(term.anchor.shape)} when the penalty "
                    "was made: make it after resizing, of statistics of the same shape."
                )
        device = next(iter(self._terms.values())).parameter.device
        return self.weight / 2 * sum(term().to(device) for term in self._terms.values())

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """The parameters that it holds back, by name."""
        return MappingProxyType({name: term.parameter for name, term in self._terms.items()})

    @property
    def anchor(self) -> Mapping[str, Tensor]:
        """``w0`` by name. Not to be changed."""
        return MappingProxyType({name: term.anchor for name, term in self._terms.items()})

    @property
    def statistics(self) -> Statistics:
        """``F``: what was given, or the decayed sum, to be saved for a task after this one."""
        return self._statistics

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What tells this penalty from another, as plain values: the weight, and a hash of 256 entries of each tensor.

        It is what :class:`fishkern.integrations.penalty.PenaltyMixin` writes into checkpoints.
        """
        hashed = blake2b(digest_size=16)
        for name, term in self._terms.items():
            hashed.update(name.encode())
            for tensor in (term.fisher, term.anchor):
                flat = tensor.reshape(-1)
                followed = flat[:: max(1, len(flat) // _FOLLOWED)].double().cpu()
                hashed.update(repr(followed.tolist()).encode())
        return {"weight": self.weight, "parameters": len(self._terms), "digest": hashed.hexdigest()}

    def __repr__(self) -> str:
        numel = sum(term.anchor.numel() for term in self._terms.values())
        return f"QuadraticPenalty({len(self._terms)} parameters, {numel:,} coordinates, weight {self.weight:g})"


class _Term:
    """One parameter's part, whose tensors follow the parameter to its device."""

    def __init__(self, parameter: nn.Parameter, fisher: Tensor, anchor: Tensor) -> None:
        self.parameter, self.fisher, self.anchor = parameter, fisher, anchor

    def __call__(self) -> Tensor:
        if self.anchor.device != self.parameter.device:
            self.fisher, self.anchor = (tensor.to(self.parameter.device) for tensor in (self.fisher, self.anchor))
        return _WeightedSquares.apply(self.parameter, self.fisher, self.anchor)


class _WeightedSquares(torch.autograd.Function):
    """``sum F (w - w0)^2``, piece by piece; the graph holds no tensor of its own."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, fisher: Tensor, anchor: Tensor) -> Tensor:
        ctx.save_for_backward(parameter)
        ctx.fisher, ctx.anchor = fisher, anchor
        total = torch.zeros((), dtype=_wide(parameter), device=parameter.device)
        for w, F, w0 in _aligned(parameter, fisher, anchor):
            distance = w - w0
            total += (F * distance).mul_(distance).sum()
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (parameter,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody wants to differentiate the gradient, so it needs a graph
            distance = parameter.to(upstream.dtype) - ctx.anchor.to(upstream.dtype)
            return (2 * upstream * ctx.fisher * distance).to(parameter.dtype), None, None
        gradient = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        remaining = gradient.view(-1)
        for w, F, w0 in _aligned(parameter, ctx.fisher, ctx.anchor):
            remaining[: len(w)] = (w - w0).mul_(F).mul_(2 * upstream)
            remaining = remaining[len(w) :]
        return gradient, None, None


def _wide(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


def _aligned(parameter: Tensor, fisher: Tensor, anchor: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    dtype = _wide(parameter)
    flat = (tensor.detach().reshape(-1).split(_PIECE) for tensor in (parameter, fisher, anchor))
    for aligned in zip(*flat, strict=True):
        w, F, w0 = (piece.to(dtype) for piece in aligned)
        yield w, F, w0


def _statistics_of(statistics: Statistics | Mapping[str, Tensor]) -> Statistics:
    """Take statistics, or make them of tensors by name."""
    if isinstance(statistics, Statistics):
        if "groups" in statistics.provenance["definition"]:
            raise ValueError("the penalty needs a number for each entry, and these statistics are of groups.")
        return statistics.whole()
    if isinstance(statistics, Held) or not isinstance(statistics, Mapping):
        raise TypeError(
            "statistics must be fishkern.Statistics or tensors by parameter name, got "
            f"{type(statistics).__name__}{from_file(statistics)}: QuadraticPenalty(statistics, model, weight)."
        )
    return Statistics(statistics, count=1)


def _penalised(fisher: Statistics, model: nn.Module) -> dict[str, nn.Parameter]:
    """Look up the parameters of the statistics; each must be one that training moves, under one name."""
    own = hosts.named_parameters(model, remove_duplicate=False)
    if missing := [name for name in fisher if name not in own]:
        raise ValueError(
            f"{type(model).__name__} has no parameter {listed(missing)}: give the statistics without it, "
            "{name: statistics[name] for name in ...}, or those of this model."
        )
    if not len(fisher):
        raise ValueError("the statistics are of no parameter.")
    names: dict[nn.Parameter, str] = {}
    for name, shape in fisher.shapes.items():
        parameter = own[name]
        if parameter.shape != shape:
            raise ValueError(
                f"the statistics hold {name} with shape {tuple(shape)}, in the model it has "
                f"{tuple(parameter.shape)}: they are of another model, or not of single entries. A head of another "
                "size has nothing to keep: leave it out, {name: statistics[name] for name in statistics if ...}."
            )
        if parameter in names:
            raise ValueError(f"{names[parameter]} and {name} are one parameter: give its statistics once.")
        names[parameter] = name
    if fixed := [name for name in fisher if not own[name].requires_grad]:
        raise ValueError(
            f"{listed(fixed)} does not require a gradient, so that nothing moves it: leave its statistics out, or "
            "make the penalty after requires_grad is set."
        )
    return {name: own[name] for name in fisher}


def _check_values(name: str, values: Tensor) -> None:
    for piece in pieces(values, _PIECE):
        low, high = (bound.item() for bound in piece.aminmax())
        if not (low >= 0 and math.isfinite(high)):
            raise ValueError(
                f"the statistics of {name} hold {low if not low >= 0 else high:g}: a penalty needs numbers from 0 on."
            )


def _decayed_sum(before: Statistics, new: Statistics, decay: float) -> Statistics:
    """``decay * before + new``, where each may have parameters of its own; the definition says that it is a sum."""
    check_definitions(before, new, "add up to one penalty", apart_from=(_SUMMED,))
    sums: dict[str, Tensor] = {}
    for name in dict.fromkeys([*before, *new]):
        parts = [decay * before[name]] if name in before else []
        parts += [new[name]] if name in new else []
        if len({part.shape for part in parts}) > 1:
            shapes = " and ".join(str(tuple(part.shape)) for part in parts)
            raise ValueError(f"{name} has the shapes {shapes} in the two penalties: leave it out of one.")
        sums[name] = sum(part.to(parts[-1].device) for part in parts)
    definition = before.provenance["definition"]
    definition[_SUMMED] = [*definition.get(_SUMMED, []), decay]
    runs = [*before.provenance["runs"], *new.provenance["runs"]]
    return Statistics(sums, count=before.count + new.count, provenance={"definition": definition, "runs": runs})
