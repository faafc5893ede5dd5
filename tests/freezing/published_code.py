"""The published code of FisherAdapTune in numpy: numbers in, numbers out, and no code of the package.

A batch's activations and output gradients give the Fisher of each parameter; its slices give histograms, distances, a
running mean J of these, its total variation, thresholds and masks, step by step.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

Array = np.ndarray
Slice = tuple[str, int]


def linear(h: Array, d: Array, bias: bool) -> tuple[Array, Array]:
    """Factors of ``h [..., I]`` and ``d [..., O]``."""
    rows, grads = h.reshape(-1, h.shape[-1]), d.reshape(-1, d.shape[-1])
    if bias:
        rows = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
    return (rows**2).mean(0), (grads**2).mean(0)


def convolution(h: Array, d: Array, kernel: int, padding: int, bias: bool) -> tuple[Array, Array]:
    """Factors of ``h [N, C, H, W]`` and ``d [N, O, H, W]``, of a square kernel with stride 1."""
    h = np.pad(h, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    N, _, height, width = d.shape
    patches = [
        h[n, :, y : y + kernel, x : x + kernel].ravel() for n in range(N) for y in range(height) for x in range(width)
    ]
    rows = np.array(patches)
    divisor = N * height * width * rows.shape[1] if bias else N
    if bias:
        rows = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
    return (rows**2).sum(0) / divisor, (d**2).mean((0, 2, 3))


def batch_norm(h: Array, d: Array) -> tuple[Array, Array]:
    """Factors of ``[N, C, H, W]``: two numbers for scale and shift, and one for each channel."""
    N, C, height, width = h.shape
    scale = ((h.sum((0, 2, 3)) / (height * width) ** 2) ** 2).sum()
    return np.array([scale, C]) / N**2, d.sum((0, 2, 3)) ** 2 / N


def layer_norm(h: Array, d: Array) -> tuple[Array, Array]:
    """Factors of ``[N, T, C]`` or ``[N, C]``; only the second axis is kept, whatever it is."""
    N, J, *rest = h.shape
    M = int(np.prod(rest)) if rest else 1
    kept = h.reshape(N, J, M).sum((0, 2)) / M**2
    return np.array([(kept**2).sum(), J]) / N**2, d.reshape(-1, d.shape[-1]).sum(0) ** 2 / N


def fisher(H: Array, S: Array) -> Array:
    """``[O, I]``, or ``[O, I + 1]`` with the bias last. The running mean begins with ones at every step."""
    H, S = (0.2 * 1 + 0.8 * factor for factor in (H, S))
    return S[:, None] * H[None, :]


def bounds(size: int, count: int = 4) -> list[tuple[int, int]]:
    edges = np.floor(np.linspace(0, size, min(count, size) + 1)).astype(int)
    return list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))


def slices(name: str, size: int) -> list[tuple[int, int]]:
    """Rows of each slice; a fused tensor of queries, keys and values is cut into these first."""
    if ".attn.qkv." in f".{name}" and size % 3 == 0:
        third = size // 3
        return [(n * third + low, n * third + high) for n in range(3) for low, high in bounds(third)]
    return bounds(size)


def distance(reference: Array, current: Array) -> float:
    """Square root of the Jensen-Shannon divergence of 64 bins of log10, in nats; the tails are dropped."""
    logs = [np.log10(np.abs(values) + 1e-12) for values in (reference, current)]
    low, high = np.percentile(np.concatenate(logs), [1, 99])
    edges = np.linspace(low, high if high > low else low + 1e-3, 65)
    p, q = (np.histogram(values, bins=edges)[0] + 1e-12 for values in logs)
    p, q = p / p.sum(), q / q.sum()
    m = (p + q) / 2
    return float(np.sqrt(max(0.0, ((p * np.log(p / m)).sum() + (q * np.log(q / m)).sum()) / 2)))


@dataclass
class Followed:
    """One slice between its readings."""

    reference: Array
    J: float = 0.0
    variation: float = 0.0
    total: float = 0.0
    count: int = 1

    def follow(self, current: Array) -> None:
        d = distance(self.reference, current)
        self.reference = 0.9 * self.reference + 0.1 * current
        before, self.J = self.J, 0.9 * self.J + 0.1 * d
        self.variation += abs(self.J - before)
        self.total += self.J
        self.count += 1


@dataclass
class Published:
    """The state of the published trainer.

    Args:
        shapes: Of every trained parameter, by name.
        every: Steps from one decision to the next.
        read_every: Steps from one reading to the next.
        margin: Of the threshold, in standard deviations.
    """

    shapes: dict[str, tuple[int, ...]]
    every: int
    read_every: int
    margin: float = 1.0
    step: int = 0
    active: set[Slice] = field(default_factory=set)
    followed: dict[Slice, Followed] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.cuts = {
            (name, n): cut for name, shape in self.shapes.items() for n, cut in enumerate(slices(name, shape[0]))
        }
        self.active = set(self.cuts)

    def before_update(self, fishers: dict[str, Array], survivors: frozenset[Slice] = frozenset()) -> set[Slice]:
        """What comes between ``backward()`` and the optimizer's step; gives what is frozen by it.

        Args:
            fishers: Of every parameter that a known module owns, of its shape; all others are zero.
            survivors: Which of the best, where only one of them stays and rounding decides: slices that are as far away
                as can be are so to 1e-13.
        """
        read = {
            key: fishers.get(key[0], np.zeros(self.shapes[key[0]]))[slice(*self.cuts[key])].ravel()
            for key in self.active
        }
        frozen: set[Slice] = set()
        if self.step == 0:
            frozen = {key for key, values in read.items() if not values.any()}
            self._stop(frozen)
        if self.step % self.read_every == 0:
            for key in self.active:
                if key in self.followed:
                    self.followed[key].follow(read[key])
                else:
                    self.followed[key] = Followed(read[key].copy())
        if self.step and self.step % self.every == 0:
            frozen = self._below(survivors)
            self._stop(frozen)
        self.step += 1
        return frozen

    def scores(self) -> dict[Slice, float]:
        return {key: self.followed[key].variation for key in self.active}

    def mask(self, name: str) -> Array:
        mask = np.zeros(self.shapes[name], dtype=bool)
        for key in self.active:
            if key[0] == name:
                mask[slice(*self.cuts[key])] = True
        return mask

    def _below(self, survivors: frozenset[Slice] = frozenset()) -> set[Slice]:
        scores = self.scores()
        values = np.array(list(scores.values()))
        threshold = values.mean() + self.margin * values.std()
        kept = {key for key, score in scores.items() if score >= threshold}
        best = {key for key, score in scores.items() if score >= values.max() - 1e-9}
        return set(scores) - (kept or {min(best & survivors or best)})

    def _stop(self, frozen: set[Slice]) -> None:
        self.active -= frozen
        self.followed = {key: one for key, one in self.followed.items() if key in self.active}
