"""The factors of a LoRA that has a start, with the values that they started from, and the rule for their gradients.

A LoRA that starts from ``B0 A0`` must have this product taken away again, or the model is not what it was. Its factors
hold their initial values, and are saved along with them, as the factors ``[A; A0]`` and ``[B, -B0]`` of an ordinary
LoRA of twice the rank. What lies on disk is thus right on the model's own weights, whoever loads it.

Residual factors are computed as ordinary ones, for a frozen weight that lacks the start; twins leave the weight alone:

    B A - B0 A0 = (B - B0) A + B0 (A - A0)

The right-hand side is computed as one product of the factors ``[A; A - A0]`` and ``[B - B0, B0]``. Before the first
step both differences are exactly 0, and so is the product, in any dtype and on any device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fishkern.layers.base import Call, Layer, positions, runs
from fishkern.layers.grads import OuterProductGrads, PerExampleGrads

_CLOSE = 2.0**-6  # of the largest entry: a file may hold initial values that were rounded to bfloat16


class _Started(nn.Linear):
    """A linear without bias whose weight is trained, and which knows its initial weight.

    ``weight`` is the trained parameter. The initial one is a buffer, which no optimizer and no ``requires_grad`` can
    reach; it is read in the dtype of the weight. In a state dict both are one entry, ``weight``.

    Args:
        linear: Gives its weight, the parameter itself, with the initial values.
    """

    _axis: ClassVar[int]  # that of the rank
    _sign: ClassVar[int]  # of the initial values in what is saved
    initial: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        self.register_buffer("initial", linear.weight.detach().clone(), persistent=False)
        self.train(linear.training)

    @property
    def rank(self) -> int:
        """The rank of the trained half, ``R``."""
        return self.weight.shape[self._axis]

    def starts_from(self, initial: Tensor) -> bool:
        """Tell whether the initial values are given ones, up to rounding to 16 bits.

        Args:
            initial: Values of the shape of the weight.

        Returns:
            Whether no entry differs by more than 2^-6 of the largest.
        """
        gap = (self.initial.float() - initial.to(self.initial.device).float()).abs().max()
        return bool(gap <= _CLOSE * self.initial.float().abs().max())

    def _differences(self) -> tuple[Tensor, Tensor, Tensor]:
        """Give the weight, the initial weight and their difference, in the dtype of the weight."""
        initial = self.initial.to(self.weight.dtype)
        return self.weight, initial, self.weight - initial

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = destination[f"{prefix}weight"]
        destination[f"{prefix}weight"] = torch.cat([weight, self._sign * self.initial.to(weight)], self._axis)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        key = f"{prefix}weight"
        if (joined := state_dict.get(key)) is not None:
            errors = lists[-1]
            shape = list(self.weight.shape)
            shape[self._axis] *= 2
            if list(joined.shape) != shape:
                errors.append(
                    f"{key} is {list(joined.shape)}, and a LoRA with a start is saved as {shape}: its trained half "
                    "first, then its initial values."
                )
                return
            weight, initial = (half.contiguous() for half in joined.chunk(2, self._axis))
            if not self.starts_from(initial := self._sign * initial):
                errors.append(
                    f"{key} was trained from another start: attach the init that it was trained from, which is saved "
                    "beside it as adapter_init.safetensors."
                )
                return
            with torch.no_grad():
                self.initial.copy_(initial)
            state_dict = {**state_dict, key: weight}
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)


class ResidualA(_Started):
    """``x A^T``, with ``A [R, I]``, beside a frozen weight from which the start was subtracted."""

    _axis, _sign = 0, 1

    def joined(self) -> Tensor:
        """Give the first factor of what training has added.

        Returns:
            ``[A; A - A0]``, ``[2 R, I]``.
        """
        weight, _, difference = self._differences()
        return torch.cat([weight, difference])


class ResidualB(_Started):
    """``x B^T``, with ``B [O, R]``, beside a frozen weight from which the start was subtracted."""

    _axis, _sign = 1, -1

    def joined(self) -> Tensor:
        """Give the second factor of what training has added.

        Returns:
            ``[B - B0, B0]``, ``[O, 2 R]``.
        """
        _, initial, difference = self._differences()
        return torch.cat([difference, initial], dim=1)


class TwinA(ResidualA):
    """``x [A; A - A0]^T``, with ``A [R, I]`` trained and ``A0`` frozen: ``[..., 2 R]``, which :class:`TwinB` takes."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.joined())


class TwinB(ResidualB):
    """``x [B - B0, B0]^T``, with ``B [O, R]`` trained and ``B0`` frozen, for what :class:`TwinA` gives."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.joined())


class Twins(Layer):
    """The trained halves of twins: ``grad_n A = sum_t (g[n, t, :R] + g[n, t, R:]) (x) x[n, t]``, and for ``B`` the
    outer products of ``g[n, t]`` and ``x[n, t, :R]``.
    """  # noqa: D205

    def covers(self, module: nn.Module) -> frozenset[str]:
        return frozenset({"weight"}) if runs(module, TwinA) or runs(module, TwinB) else frozenset()

    def per_example_grads(
        self, call: Call, output_grads: Tensor, names: frozenset[str]
    ) -> Iterator[tuple[str, PerExampleGrads]]:
        module: Any = call.module
        g = positions(output_grads)
        x = positions(call.input).to(g.dtype)  # under autocast the input is wider
        if isinstance(module, TwinA):
            g = g[..., : module.rank] + g[..., module.rank :]
        else:
            x = x[..., : module.rank]
        yield "weight", OuterProductGrads(x, g, module.weight.shape)
