"""The Fisher energy of rank-one directions of each weight matrix, streamed, without a covariance or a gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fishkern import hosts
from fishkern.arguments import integer, one_of
from fishkern.backend import Backend
from fishkern.digests import digest
from fishkern.layers import LinearMap, OuterProductGrads
from fishkern.names import listed
from fishkern.ops import project_sum_squared
from fishkern.ops.dtypes import accumulates_in
from fishkern.statistics.base import Constant, Estimator, ParameterInfo, Positions, Reads, State
from fishkern.statistics.bases import power_directions, svd_directions
from fishkern.statistics.coverage import Covered
from fishkern.statistics.energies import Energies
from fishkern.statistics.parted import entries_of


@dataclass(frozen=True)
class DirectionEnergy(Estimator):
    r"""Energies of activations, output gradients and gradients along rank-one directions of each weight matrix.

    With ``h`` what enters the module at a position, ``d`` the gradient of the example's loss at its output, and the
    directions ``u_k v_k^T`` of its matrix ``M [O, I]``:

        input[k]  = mean_{n,t} (v_k . h_nt)^2
        output[k] = mean_{n,t} (u_k . d_nt)^2
        joint[k]  = mean_n ( sum_t (u_k . d_nt) (v_k . h_nt) )^2 = mean_n <grad_n, u_k v_k^T>^2

    ``input * output`` is the quadratic form of the Kronecker-factored Fisher (Martens and Grosse 2015), by which FARSS
    and FILet choose directions; ``joint`` is that of the exact per-example Fisher, at no further cost. The result is
    :class:`Energies`. Everything is projected on the basis and squared as it arrives
    (:func:`fishkern.ops.project_sum_squared`): there is no matrix ``[I, I]`` or ``[O, O]`` of covariances, and no
    gradient.

    ``parameters=None`` of :func:`fishkern.estimate` takes the weight of every linear map with ``requires_grad``;
    a parameter without activations and output gradients that is asked for is refused by name.

    Cost: the projections take ``2 K (O + I)`` FLOPs at each position, where a forward pass takes ``2 O I``. Memory:
    the basis of each matrix, ``K (O + I)`` entries in the weight's dtype, so that directions of a 16-bit weight are
    rounded to 16 bits.

    Args:
        basis: ``"svd"`` for the singular vectors, ``K = min(O, I)``; ``"power"`` for FILet's ``K = I`` candidates, one
            power step from each coordinate axis (``V`` the unit columns of ``M^T M``, ``U`` those of ``M V``).
        positions: Which positions count in the means ``input`` and ``output``: those that ``attention_mask`` marks
            (``"attended"``), those whose output has a label (``"labelled"``), or ``"all"``. A module without positions
            has one for each example. ``joint`` has the whole gradient in any case.
        importance: Also a number for each whole matrix: ``"kronecker"``, ``<E[d d^T], M E[h h^T] M^T> / (O I)``, which
            is FARSS's, from two Gram matrices of the smaller side; ``"exact"``, ``mean_n <grad_n, M>^2 / (O I)``.
        importance_of: Names or patterns of the weights to take the importance of; each must match one.
        layers_per_pass: Read the data once for every so many transformer layers, so that only their bases are in
            memory; ``None`` for one pass. The data must be the same each time.

    Raises:
        ValueError: An argument is not among the values above.
        TypeError: ``layers_per_pass`` is not an integer, or ``importance_of`` is not patterns.
    """

    reads: ClassVar[Reads] = "factors"
    by_default: ClassVar[Literal["trainable", "linear"]] = "linear"
    basis: Literal["svd", "power"] = "svd"
    positions: Positions = "attended"
    importance: Literal["kronecker", "exact"] | None = None
    importance_of: str | Sequence[str] = "*"
    layers_per_pass: int | None = None

    def __post_init__(self) -> None:
        one_of(self.basis, ("svd", "power"), "basis")
        one_of(self.positions, ("attended", "labelled", "all"), "positions")
        one_of(self.importance, (None, "kronecker", "exact"), "importance")
        patterns = [self.importance_of] if isinstance(self.importance_of, str) else self.importance_of
        if not isinstance(patterns, list | tuple) or not all(isinstance(one, str) for one in patterns):
            raise TypeError(
                f"importance_of must be patterns of names such as '*.layers.0.*', got {self.importance_of!r}."
            )
        object.__setattr__(self, "importance_of", tuple(patterns))
        if self.layers_per_pass is not None and integer(self.layers_per_pass, "layers_per_pass") < 1:
            raise ValueError(f"layers_per_pass must be at least 1, got {self.layers_per_pass}.")

    @property
    def definition(self) -> dict[str, Any]:
        importance = {"importance": self.importance, "importance_of": list(self.importance_of)}
        return {
            "estimator": "DirectionEnergy",
            "unit": "example",
            "basis": self.basis,
            "positions": self.positions,
            **(importance if self.importance else {}),
        }

    def passes(self, names: Sequence[str]) -> list[list[str]]:
        for pattern in self.importance_of if self.importance else ():
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(f"importance_of={pattern!r} matches none of {len(names)} weights ({listed(names)}).")
        if self.layers_per_pass is None:
            return [list(names)]
        layers = hosts.layer_of(names)
        numbers = {path: number for number, path in enumerate(dict.fromkeys(_place(layers[one], one) for one in names))}
        groups: dict[int, list[str]] = {}
        for name in names:
            groups.setdefault(numbers[_place(layers[name], name)] // self.layers_per_pass, []).append(name)
        return list(groups.values())

    def init(self, parameter: ParameterInfo) -> State:
        basis = _basis(parameter, self.basis)
        state = {part: _zeros(parameter, basis.U.shape[1]) for part in ("input", "output", "joint")}
        state["positions"] = torch.zeros((), dtype=torch.int64, device=parameter.device)
        state["matrix"] = Constant(torch.tensor([*_map(parameter).shape, *digest(basis.matrix)], dtype=parameter.dtype))
        if basis.singular_values is not None:
            state["singular_values"] = Constant(basis.singular_values.to(parameter.dtype))
        if self._is_important(parameter.name):
            if self.importance == "exact":
                state["importance"] = _zeros(parameter)
            else:
                smaller = min(_map(parameter).shape)
                state["grams"] = _zeros(parameter, 2, smaller, smaller)
        return state

    def update_(
        self, state: State, grads: OuterProductGrads, parameter: ParameterInfo, backend: Backend | None = None
    ) -> None:
        h, d = grads.activations, grads.output_grads
        if _map(parameter).transposed:  # of the stored matrix, whose rows are the input's features
            h, d = d, h
        basis = _basis(parameter, self.basis)
        M = basis.matrix
        projected = h if self.basis == "svd" else _product(h, M.T)  # the power basis is one of y = M h
        sums = project_sum_squared(projected, d, basis.V, basis.U, counted=grads.counted, backend=backend)
        for part, added in zip(("input", "output", "joint"), sums, strict=True):
            state[part] += added
        counted = grads.counted
        state["positions"] += counted.sum() if counted is not None else h.shape[0] * h.shape[1]
        if "importance" in state:
            y = projected if self.basis == "power" else _product(h, M.T)
            dtype = accumulates_in(d.dtype)
            state["importance"] += (y.to(dtype) * d.to(dtype)).sum((1, 2)).square().sum()
        if "grams" in state:
            _add_grams(state["grams"], h if counted is None else h[counted], d if counted is None else d[counted], M)

    def of_gradient(self, grad: Tensor, parameter: ParameterInfo) -> State:
        linear, basis = _map(parameter), _basis(parameter, self.basis)
        dtype = accumulates_in(basis.U.dtype)
        G = grad.to(dtype).flatten(1)
        G = G.T if linear.transposed else G
        M, V = basis.matrix.to(dtype), basis.V.to(dtype)
        if self.basis == "power":  # through the smaller side
            O, I = linear.shape
            G_V = G @ M.T @ V if O <= I else G @ (M.T @ V)
        else:
            G_V = G @ V
        along = (G_V * basis.U.to(dtype)).sum(0)
        added: dict[str, Tensor | None] = dict.fromkeys(("input", "output", "joint", "positions", "matrix"))
        added["joint"] = along.square()
        if self.basis == "svd":
            added["singular_values"] = None
        if self._is_important(parameter.name):
            part = "importance" if self.importance == "exact" else "grams"
            added[part] = (G * M).sum().square() if self.importance == "exact" else None
        return added

    def result(self, state: State, count: int) -> dict[str, Tensor]:
        dtype = state["joint"].dtype
        constants = {part: total.value for part, total in state.items() if isinstance(total, Constant)}
        means = {part: (total / count).to(dtype) for part, total in state.items() if part not in constants}
        means["positions"] = (state["positions"].double() / count).to(dtype)  # a float32 has no room for large integers
        return {**means, **constants}

    def collect(
        self,
        model: nn.Module,
        results: Mapping[str, Mapping[str, Tensor]],
        *,
        count: int,
        provenance: Mapping[str, Any],
        coverage: Mapping[str, Covered],
    ) -> Energies:
        return Energies(entries_of(results), count=count, provenance=provenance, coverage=coverage)

    def _is_important(self, name: str) -> bool:
        wanted = any(fnmatchcase(name, pattern) for pattern in self.importance_of)
        return self.importance is not None and wanted


class _Basis(NamedTuple):
    """A basis in the dtype that projections take: for FILet's, ``V`` projects ``y = M h`` and not ``h``."""

    U: Tensor
    V: Tensor
    matrix: Tensor
    singular_values: Tensor | None


def _map(parameter: ParameterInfo) -> LinearMap:
    if parameter.linear is None:
        raise TypeError(f"{parameter.name} is described without the linear map whose weight it is.")
    return parameter.linear


def _basis(parameter: ParameterInfo, kind: str) -> _Basis:
    """Return the basis of a parameter, which is computed once."""
    if kind not in parameter.kept:
        M = _map(parameter).matrix()
        if kind == "svd":
            U, V, values = svd_directions(M)
        else:
            (U, V, _), values = power_directions(M), None
        # 16-bit directions multiply faster, and move an energy by less than a hundredth
        parameter.kept[kind] = _Basis(U.to(M.dtype), V.to(M.dtype), M, values)
    return parameter.kept[kind]


def _product(factors: Tensor, matrix: Tensor) -> Tensor:
    """Multiply ``[N, T, I]`` by ``[I, O]`` in the dtype of the factors, as the module itself does."""
    return factors @ matrix.to(factors.dtype)


def _add_grams(grams: Tensor, h: Tensor, d: Tensor, M: Tensor) -> None:
    """Add the Gram matrices whose product is the Kronecker importance: of ``d`` and ``M h``, or ``h`` and ``M^T d``."""
    O, I = M.shape
    first, second = (d, _product(h, M.T)) if O <= I else (h, _product(d, M))
    for gram, rows in zip(grams, (first, second), strict=True):
        rows = rows.flatten(0, -2).to(gram.dtype)
        gram.addmm_(rows.T, rows)


def _zeros(parameter: ParameterInfo, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)


def _place(layer: hosts.Layer | None, name: str) -> str:
    """Name the transformer layer of a parameter; one outside the layers is alone."""
    return layer.path if layer else name
