"""A call of a module of fused experts, computed again from its tensors: what is between the two maps of an expert."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from fishkern.layers.base import Call
from fishkern.layers.routed import Routes
from fishkern.layers.unsupported import UnsupportedModuleError

# An output computed again is that of the module, up to sums in another order.
_SAME_OUTPUT = 256  # in units of the dtype's rounding
_SAME_OUTPUT_16_BIT = 0.05


def maps_of(module: nn.Module) -> tuple[str, str]:
    """Name the weights of the two linear maps of a module of experts, as transformers does.

    Args:
        module: A module of experts.

    Returns:
        The name of the weight before the gate, or the activation, and of that behind it.
    """
    return "gate_up_proj" if module.has_gate else "up_proj", "down_proj"


def demanded(computed: ExpertCall | None, module: nn.Module) -> ExpertCall:
    """Refuse a call that is not of the kind that was confirmed.

    Args:
        computed: The call computed again, or ``None``.
        module: The module that was called.

    Returns:
        The call.

    Raises:
        UnsupportedModuleError: It is ``None``.
    """
    if computed is None:
        raise UnsupportedModuleError(
            f"{type(module).__name__} was called in another way than by the first examples: expected (hidden states, "
            "index of experts, their shares) and no negative index. Call it alike in every batch, or leave its "
            "parameters out with parameters=lambda name, parameter: ..."
        )
    return computed


@dataclass(frozen=True)
class ExpertCall:
    """The rows that the positions of a call have sent to experts, sorted by expert.

    Args:
        module: The module of experts.
        weights: The weights and biases in force, by name.
        call: The call, of the module or of one around it.
        x: Input of all positions, ``[T, I]``.
        expert: Expert of each row, ``[S]``, ascending.
        position: Position that sent it, ``[S]``, ascending within each expert.
        share: Weight of the row's output in that of its position, ``[S]``.
        ends: Where the rows of each expert end, ``E`` numbers.
    """

    module: nn.Module
    weights: Mapping[str, Tensor]
    call: Call
    x: Tensor
    expert: Tensor
    position: Tensor
    share: Tensor
    ends: list[int]

    @classmethod
    def of(cls, call: Call, module: nn.Module, weights: Mapping[str, Tensor]) -> ExpertCall | None:
        """Read a call on ``(hidden states, index of experts, their shares)``.

        Args:
            call: The call.
            module: The module of experts.
            weights: The weights and biases in force, by name.

        Returns:
            Its rows; ``None`` if its arguments are others, or the index of an expert is negative.
        """
        leaves = tree_leaves((call.args, dict(call.kwargs)))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        floating = [one for one in tensors if one.is_floating_point()]
        index = next((one for one in tensors if not one.is_floating_point()), None)
        if len(leaves) != 3 or len(floating) != 2 or index is None or floating[1].shape != index.shape:
            return None
        x, share = floating[0].reshape(-1, floating[0].shape[-1]), floating[1].reshape(-1)
        if index.numel() != len(x) * index.shape[-1]:
            return None
        expert, order = index.reshape(-1).long().sort(stable=True)
        experts = torch.arange(module.num_experts + 1, device=expert.device)
        negative, *ends = torch.searchsorted(expert, experts).tolist()
        if negative:  # kernels read such numbers in different ways
            return None
        expert, order = expert[: ends[-1]], order[: ends[-1]]  # a number behind the last expert means none
        return cls(module, weights, call, x, expert, order // index.shape[-1], share[order], ends)

    def gives(self, output: Tensor, sum_: Callable[[Tensor], object] = lambda rows: None) -> bool:
        """Tell whether the call, computed again, gives an output.

        Args:
            output: That of the module.
            sum_: Adds what other processes compute of each row, in place.

        Returns:
            Whether it is the same, but for rounding. An output of zeros shows nothing.
        """
        _, down = maps_of(self.module)
        rows = self._mapped(self._middle()[1], down) * self.share[:, None]
        dtype = torch.promote_types(rows.dtype, torch.float32)
        again = torch.zeros(*self.x.shape[:1], rows.shape[1], dtype=dtype, device=rows.device)
        again.index_add_(0, self.position, rows.to(dtype))
        sum_(again)
        if not output.numel() or again.numel() != output.numel():
            return False
        half = self.call.autocast[1] or torch.finfo(output.dtype).bits == 16
        allowed = _SAME_OUTPUT_16_BIT if half else _SAME_OUTPUT * torch.finfo(output.dtype).eps
        largest = output.abs().max()
        return bool((again.view_as(output) - output).abs().max() <= allowed * largest) and bool(largest)

    def factors(self, output_grads: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Compute the factors of the gradients of both maps.

        Args:
            output_grads: Gradient of the summed loss by the output of the call.

        Returns:
            For each map, by the name of its weight, the activations ``[S, I]`` and the output gradients ``[S, O]``.
        """
        up, down = maps_of(self.module)
        before, middle = self._middle()
        grads = output_grads.reshape(len(self.x), -1)[self.position] * self.share[:, None]
        grads = grads.to(middle.dtype)
        (grads_before,) = torch.autograd.grad(middle, before, self._mapped_back(grads, down))
        x = self.x[self.position].to(grads_before.dtype)
        return {up: (x, grads_before), down: (middle.detach().to(grads.dtype), grads)}

    def routes(self, rows: int) -> Routes:
        """Say whose the rows are.

        Args:
            rows: How many rows the output has; each counts as an example.

        Returns:
            The routes.
        """
        return Routes(self.expert, self.position, len(self.x), rows)

    def each(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Map the rows of each expert by its weight.

        Args:
            rows: ``[S, I]``.
            weights: ``[E, O, I]``, of any strides.

        Returns:
            ``[S, O]``, of the dtype of the weights, or that of autocast.
        """
        starts = [0, *self.ends[:-1]]
        with self._autocast():
            parts = [
                F.linear(rows[start:end].to(weights.dtype), weights[e])
                for e, (start, end) in enumerate(zip(starts, self.ends, strict=True))
                if end > start
            ]
        return torch.cat(parts) if parts else rows.new_empty(0, weights.shape[1], dtype=weights.dtype)

    def _middle(self) -> tuple[Tensor, Tensor]:
        """Compute what goes into the gate, which requires a gradient, and what comes out."""
        up, _ = maps_of(self.module)
        before = self._mapped(self.x[self.position], up).detach().requires_grad_()
        gate = self.module._apply_gate if self.module.has_gate else self.module.act_fn
        with torch.enable_grad(), self._autocast():
            return before, gate(before)

    def _mapped(self, x: Tensor, name: str) -> Tensor:
        """Map rows by the weight of their expert, and add its bias."""
        weight, bias = self.weights[name], self.weights.get(f"{name}_bias")
        with torch.no_grad():
            y = self.each(x, weight.mT if self.module.is_transposed else weight)
            return y if bias is None else y + bias[self.expert].to(y.dtype)

    def _mapped_back(self, grads: Tensor, name: str) -> Tensor:
        """Map gradients by the transposed weight of their expert."""
        weight = self.weights[name]
        with torch.no_grad():
            return self.each(grads, weight if self.module.is_transposed else weight.mT)

    def _autocast(self) -> torch.autocast:
        device_type, enabled, dtype = self.call.autocast
        return torch.autocast(device_type, dtype=dtype, enabled=enabled)
