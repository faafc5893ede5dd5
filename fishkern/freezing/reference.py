"""What the published code of FisherAdapTune reads, measures and decides, its defects included.

For comparison only (Rostami et al., 2026, arXiv:2606.10196): readings are of the batch that the model trains on, in the
mode that it is in, and are hidden by a constant that the code means to be the start of a running mean. What it does not
know is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from fishkern import hosts
from fishkern.freezing.drift import JensenShannon, Track
from fishkern.freezing.histograms import counts_of, divergence_root, edges_of, span_of
from fishkern.freezing.readings import Reading
from fishkern.freezing.rule import FreezeRule
from fishkern.freezing.slices import Key
from fishkern.freezing.sources import Source
from fishkern.ops.dtypes import accumulates_in
from fishkern.statistics import Statistics

_KNOWN = {"Linear": nn.Linear, "Conv2d": nn.Conv2d, "BatchNorm2d": nn.BatchNorm2d, "LayerNorm": nn.LayerNorm}
_SHARE = 0.8  # of what is measured; the rest is the 1 that its running mean begins with anew at every step


class ReferenceReadings(Statistics):
    """The values of one step, by parameter; float64 for a model in float64."""

    KEEPS: ClassVar[tuple[torch.dtype, ...]] = (torch.float32, torch.float64)


class ReferenceFactors(Source):
    """Factors of the last backward pass of training, as the published code takes them.

    Of modules whose class is named exactly Linear, Conv2d, BatchNorm2d or LayerNorm, hooks measure what enters, ``H``
    with a 1 appended for the bias, and the gradient ``d`` of the loss at the output, ``S [O]``. With the batch's
    ``N`` examples, positions ``t`` and, for a convolution, ``P`` places of ``K`` entries under the kernel:

        Linear       H[i] = mean_{n,t} h[i]^2                                 S[o] = mean_{n,t} d[o]^2
        Conv2d       H[k] = sum_{n,p} patch[k]^2 / (N P K), / N without bias  S[o] = mean_{n,p} d[o]^2
        BatchNorm2d  H = [sum_c (sum_{n,p} h[c] / P^2)^2, C] / N^2            S[c] = (sum_{n,p} d[c])^2 / N
        LayerNorm    H = [sum_j (sum h[j] / M^2)^2, J] / N^2                  S[c] = (sum_{n,t} d[c])^2 / N

    The loss is averaged already. LayerNorm's inner sum keeps the second axis ``j`` and no other (``M`` is the product
    of the axes after it): the features of ``[N, C]``, the positions of ``[N, T, C]``. Both factors then become ``0.2 +
    0.8 * factor``, since the running mean that they belong to begins with ones at every step; the Fisher is

        F[o, i] = S[o] H[i]

    the bias has the last column. It is zero for every other parameter (embeddings, RMSNorm, transformers' ``Conv1D``,
    parameters of a module without a known class), of a module that the last batch did not reach, and where the shapes
    do not fit (a LayerNorm without bias).

    The hooks are on the model from the start. ``with`` or :meth:`close` takes them off; :meth:`open` puts them on
    again. Cost: the factors of each module at each step.

    Args:
        model: What trains; wrappers are removed.

    Raises:
        ValueError: A convolution pads by name (``padding="same"``), which the published code does not.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = hosts.unwrap(model)
        self._modules = [one for one in self._model.modules() if _is_known(one)]
        by_name = [one for one in self._modules if isinstance(getattr(one, "padding", None), str)]
        if by_name:
            raise ValueError(
                f"compat='reference' reads convolutions whose padding is in numbers, and {by_name[0]} names it: give "
                "the numbers, or use FisherAdapTune without compat."
            )
        self._entered: dict[nn.Module, Tensor] = {}
        self._returned: dict[nn.Module, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self.open()

    def open(self) -> Self:
        """Put the hooks on the model, if they are off.

        Returns:
            The source itself.
        """
        if not self._handles:
            self._handles = [one.register_forward_hook(self._note) for one in self._modules]
            self._handles.append(self._model.register_forward_pre_hook(self._begin))
        return self

    def close(self) -> None:
        """Take the hooks off the model, and forget what they measured."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._forget()

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def read(self) -> Statistics:
        """Read the last backward pass.

        Returns:
            Values of every parameter with ``requires_grad``, of its shape, by canonical name; ``count`` is 1, for the
            batch. NaN is 0, as in the published code.

        Raises:
            RuntimeError: There was no backward pass, or the hooks are off.
        """
        if not self._returned:
            raise RuntimeError(
                "there is no backward pass to read: call the model and backward() before it, while the source is open."
            )
        named = {name: one for name, one in hosts.named_parameters(self._model).items() if one.requires_grad}
        values = {}
        for module in self._modules:
            if module in self._entered and module in self._returned:
                values |= _values(module, self._entered[module], self._returned[module])
        tensors = {name: values[one] if one in values else torch.zeros_like(one) for name, one in named.items()}
        definition = {"estimator": "ReferenceFactors", "unit": "batch"}
        return ReferenceReadings(tensors, count=1, provenance={"definition": definition})

    def _forget(self) -> None:
        self._entered.clear()
        self._returned.clear()

    def _begin(self, module: nn.Module, args: Any) -> None:
        if torch.is_grad_enabled():  # a validation between backward and the step leaves what was measured
            self._forget()

    def _note(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if torch.is_grad_enabled() and args and output.requires_grad:
            self._entered[module] = _floored(_input_factor(module, args[0].detach()))
            # not a backward hook of the module, which breaks activations that work in place behind it
            output.register_hook(self._noting(module))

    def _noting(self, module: nn.Module) -> Callable[[Tensor], None]:
        def note(grad: Tensor) -> None:
            self._returned[module] = _floored(_output_factor(module, grad.detach()))

        return note


@dataclass(frozen=True)
class ReferenceDrift(JensenShannon):
    """The drift of the published code: ``bins`` bins for a slice of any size, also where they measure chance.

    Percentiles within a single entry leave both values out, so a slice of one entry never drifts.

    Args:
        bins: As for :class:`~fishkern.JensenShannon`, whatever the size of the slice; as all that follow.
        scale: As there.
        range: As there.
        decay: As there.
        smoothing: As there.
        score: As there.
        reference: As there; only ``"values"``.

    Raises:
        ValueError: As there; or ``reference`` is another.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reference != "values":
            raise ValueError(f"the published code keeps reference='values', got {self.reference!r}.")

    def follow(self, track: Track | None, reading: Reading) -> Track:
        if track is None or not isinstance(reading, Tensor):
            return super().follow(track, reading)
        (reference,) = track.reference
        distance = self._distance(reference, reading)
        return self._counted_in(track, distance, (self.decay * reference + (1 - self.decay) * reading,))

    def _distance(self, reference: Tensor, reading: Tensor) -> float:
        if reading.numel() == 1 and self.scale == "log":
            return 0.0
        pair = (reference, reading)
        edges = edges_of(span_of(pair, self.scale, self.range), self.bins)
        return divergence_root(*(counts_of(one, edges, self.scale) for one in pair))


@dataclass(frozen=True)
class ReferenceRule(FreezeRule):
    """The rule of the published code: what is at least ``mean + margin * deviation`` stays, or else the best alone.

    Args:
        margin: As for :class:`~fishkern.FreezeRule`, as all that follow; those others have no limit by default.
        most: As there.
        least: As there.
        spare: As there.
        size_aware: As there.

    Raises:
        TypeError: As there.
        ValueError: As there.
    """

    most: float | None = None
    least: int = 0
    size_aware: bool = False

    def choose(self, scores: Mapping[Key, float], sizes: Mapping[Key, int], total: int) -> frozenset[Key]:
        chosen = super().choose(scores, sizes, total)
        if scores and len(chosen) == len(scores):
            best = max(scores.values())
            return chosen - {min(key for key, score in scores.items() if score == best)}
        return chosen


def _is_known(module: nn.Module) -> bool:
    """Tell whether the class is one of the four by its name, and is torch's (PEFT has a Linear of its own)."""
    kind = _KNOWN.get(type(module).__name__)
    return kind is not None and isinstance(module, kind) and any(True for _ in module.parameters(recurse=False))


def _floored(factor: Tensor) -> Tensor:
    return (1 - _SHARE) + _SHARE * factor


def _input_factor(module: nn.Module, h: Tensor) -> Tensor:
    """Compute ``H`` as :class:`ReferenceFactors` says."""
    h = h.to(accumulates_in(h.dtype))
    N = h.shape[0]
    if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
        others = [axis for axis in range(h.ndim) if axis != 1]
        sums = h.sum(others) / h.shape[2:].numel() ** 2
        return torch.stack([sums.square().sum(), sums.new_tensor(len(sums))]) / N**2
    if isinstance(module, nn.Linear):
        rows = h.flatten(0, -2)
        divisor = len(rows)
    else:
        patches = F.unfold(h, module.kernel_size, padding=module.padding, stride=module.stride)  # not dilated: as there
        K, P = patches.shape[1] // module.groups, patches.shape[2]
        rows = patches.unflatten(1, (module.groups, K)).transpose(2, 3).reshape(-1, K)
        divisor = N if module.bias is None else N * P * K
    squares = rows.square().sum(0)
    if module.bias is not None:
        squares = torch.cat([squares, squares.new_tensor([len(rows)])])
    return squares / divisor


def _output_factor(module: nn.Module, d: Tensor) -> Tensor:
    """Compute ``S`` as :class:`ReferenceFactors` says."""
    d = d.to(accumulates_in(d.dtype))
    if isinstance(module, nn.LayerNorm):
        return d.flatten(0, -2).sum(0).square() / d.shape[0]
    if isinstance(module, nn.Linear):
        return d.flatten(0, -2).square().mean(0)
    if isinstance(module, nn.BatchNorm2d):
        return d.sum((0, 2, 3)).square() / d.shape[0]
    return d.square().mean((0, 2, 3))


def _values(module: nn.Module, H: Tensor, S: Tensor) -> dict[nn.Parameter, Tensor]:
    """Multiply the factors of a module, for its weight and its bias; nothing where the shapes do not fit."""
    products = torch.nan_to_num(torch.outer(S, H))
    parts = {module.weight: products if module.bias is None else products[:, :-1]}
    if module.bias is not None:
        parts[module.bias] = products[:, -1]
    if any(one.numel() != part.numel() for one, part in parts.items()):
        return {}
    return {one: part.reshape(one.shape) for one, part in parts.items()}
