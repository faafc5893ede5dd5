"""Energies with chosen values, and the formulas of FARSS and FILet by explicit covariances, one example at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import fishkern as fk
from fishkern.digests import digest
from fishkern.layers import linear_maps
from tests.support import oracle


def made_energies(
    model: nn.Module,
    *,
    basis: str = "svd",
    count: int = 10,
    positions: float = 50.0,
    seed: int = 0,
    **given: Mapping[str, Tensor],
) -> fk.Energies:
    """Random energies of a model's linear maps; ``input=``, ``output=`` and ``joint=`` replace some by name."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, one in linear_maps(model).items():
        O, I = one.shape
        K = min(O, I) if basis == "svd" else I
        for part in ("input", "output", "joint"):
            values = given.get(part, {}).get(name, torch.rand(K, generator=generator) + 0.1)
            tensors[f"{name}/{part}"] = values * (1 if part == "joint" else positions)
        tensors[f"{name}/positions"] = torch.tensor(positions)
        tensors[f"{name}/matrix"] = torch.tensor([O, I, *digest(one.matrix())])
        if basis == "svd":
            tensors[f"{name}/singular_values"] = torch.linalg.svdvals(one.matrix().double()).float()
    return fk.Energies(
        tensors, count=count, provenance={"definition": {"estimator": "DirectionEnergy", "basis": basis}}
    )


@dataclass
class Covariances:
    """Sums for one weight ``M [O, I]``, float64: of ``h h^T`` and ``d d^T`` over positions, and each gradient."""

    M: Tensor
    hh: Tensor
    dd: Tensor
    positions: int = 0
    grads: list[Tensor] = field(default_factory=list)  # [O, I] for each example

    def kronecker(self, U: Tensor, V: Tensor) -> Tensor:
        """(v^T E[h h^T] v) (u^T E[d d^T] u) of each pair of columns."""
        return (V * (self.hh @ V)).sum(0) * (U * (self.dd @ U)).sum(0) / self.positions**2

    def joint(self, U: Tensor, V: Tensor) -> Tensor:
        """mean_n <grad_n, u v^T>^2 of each pair of columns."""
        return torch.stack([(U * (grad @ V)).sum(0).square() for grad in self.grads]).mean(0)

    def importance(self, fisher: str) -> float:
        """FARSS: Tr(E[d d^T] W E[h h^T] W^T) / (O I); or the exact mean_n <grad_n, W>^2 / (O I)."""
        if fisher == "joint":
            return (torch.stack([(grad * self.M).sum().square() for grad in self.grads]).mean() / self.M.numel()).item()
        product = self.dd @ self.M @ self.hh @ self.M.T
        return (product.trace() / self.positions**2 / self.M.numel()).item()


def noted(seen: dict[str, tuple[Tensor, Tensor]], name: str) -> Callable[..., None]:
    """A hook that notes input and output of a module."""

    def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen[name] = (args[0].detach(), output)

    return note


def covariances(
    model: nn.Module, batches: Iterable[dict], loss: oracle.Loss, names: Iterable[str]
) -> dict[str, Covariances]:
    """Run one example at a time through autograd, with hooks on the modules; attended positions count."""
    model = model.double().eval()
    modules, sums = {}, {}
    for name in names:
        module = model.get_submodule(name.removesuffix(".weight"))
        M = module.weight.detach().T if type(module).__name__ == "Conv1D" else module.weight.detach()
        modules[name] = module
        zeros = [torch.zeros(size, size, dtype=torch.float64) for size in (M.shape[1], M.shape[0])]
        sums[name] = Covariances(M, *zeros)
    for batch in batches:
        for n in range(oracle.size(batch)):
            one = oracle.row(batch, n)
            seen: dict[str, tuple[Tensor, Tensor]] = {}
            handles = [module.register_forward_hook(noted(seen, name)) for name, module in modules.items()]
            value = loss(model, one)
            for handle in handles:
                handle.remove()
            gradients = torch.autograd.grad(value, [output for _, output in seen.values()])
            attended = one["attention_mask"][0].bool()
            for (name, (h, _)), d in zip(seen.items(), gradients, strict=True):
                h, d = h.reshape(-1, h.shape[-1]), d.reshape(-1, d.shape[-1])
                sums[name].grads.append(d.T @ h)
                counted = attended if len(h) == len(attended) else torch.ones(len(h), dtype=torch.bool)
                sums[name].hh += h[counted].T @ h[counted]
                sums[name].dd += d[counted].T @ d[counted]
                sums[name].positions += int(counted.sum())
    return sums
