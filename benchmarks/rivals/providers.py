"""All providers, by operation, under the names that the records have for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

import fishkern as fk
from benchmarks import rivals
from benchmarks.engine.origin import version_of
from benchmarks.rivals import backpack, kronfluence, layers, masked, nngeometry, opacus, topk
from benchmarks.subjects.scores import read_once
from fishkern.ops import sum_grad_squared

# Okabe and Ito's colours, which stay apart for every kind of colour vision. Providers that share one are never in one
# picture.
OURS, VERMILION, ORANGE, GREEN = "#0072B2", "#D55E00", "#E69F00", "#009E73"
PINK, SKY, BLACK, OLIVE, GREY = "#CC79A7", "#56B4E9", "#000000", "#999933", "#777777"


@dataclass(frozen=True)
class Provider:
    """One way to the result of an operation.

    Args:
        run: The function; all of one list have the same arguments.
        label: Its name in pictures, where that differs from the one in the records.
        colour: Of it in pictures.
        settings: How it is used, in words.
        package: The distribution that it needs, if any.
        exact: Whether its result, where it gives one, is the operation's.
    """

    run: Callable[..., Any]
    label: str = ""
    colour: str = GREY
    settings: str = ""
    package: str | None = None
    exact: bool = True

    @property
    def version(self) -> str | None:
        return version_of(self.package) if self.package else None

    @property
    def why_not(self) -> str | None:
        """What keeps it from running, before it is tried."""
        return f"{self.package} is not installed" if self.package and not self.version else None


def fishkern(model: nn.Module, batches: list[dict[str, Tensor]]) -> fk.Statistics:
    """As a user calls it, self-check included."""
    return fk.estimate(model, batches)


def fishkern_unchecked(model: nn.Module, batches: list[dict[str, Tensor]]) -> fk.Statistics:
    """Without the comparison of the first two examples, which is spread over many batches in practice."""
    return fk.estimate(model, batches, check=False)


# Of a pass over data: run(model, batches) gives squares by name, of the parameters that it covers.
PASSES = {
    "fishkern": Provider(fishkern, "", OURS, "estimate with its defaults, self-check included"),
    "fishkern_unchecked": Provider(fishkern_unchecked, "", OLIVE, "estimate with check=False"),
    "one_by_one": Provider(
        rivals.one_by_one, "batch-size-1 loop", VERMILION, "batch size 1, squared in a hook on each gradient"
    ),
    "vmap_grad": Provider(
        rivals.vmap_grad, "torch.func vmap", ORANGE,
        "torch.func.vmap of grad over the whole batch, squared in place", "torch",
    ),
    "opacus": Provider(opacus.opacus, "Opacus", GREEN, opacus.SETTINGS, "opacus"),
    "backpack": Provider(backpack.backpack, "BackPACK", PINK, backpack.SETTINGS, "backpack-for-pytorch"),
    "kronfluence": Provider(kronfluence.kronfluence, "", BLACK, kronfluence.SETTINGS, "kronfluence"),
    "nngeometry": Provider(nngeometry.nngeometry, "", SKY, nngeometry.SETTINGS, "nngeometry"),
}  # fmt: skip
# Of the same, but no rivals that cover a model: a yardstick, and linears alone.
PARTS_OF_A_PASS = {
    "forward_backward": Provider(rivals.forward_backward, "forward + backward alone", GREY, exact=False),
    "per_layer_bmm": Provider(rivals.per_layer_bmm, "bmm for each layer", OLIVE),
}
# Of a layer: run(x, g) gives its sum of squares.
LAYERS = {
    "fishkern": Provider(sum_grad_squared, "", OURS),
    "loop": Provider(layers.loop, "batch-size-1 loop", VERMILION),
    "vmap": Provider(layers.vmap_products, "torch.func vmap", ORANGE),
}
# Of top-k: run(scores, k) gives indices.
TOPK = {
    "fishkern": Provider(topk.fishkern, "", OURS),
    "sampled_threshold": Provider(topk.sampled_threshold, "sampled threshold", GREEN, exact=False),
    "kthvalue": Provider(topk.kthvalue, "torch.kthvalue", ORANGE),
    "cat_topk": Provider(topk.cat_topk, "torch.cat + topk", VERMILION),
}
# Of a file of scores: run(path) reads it once, which any selection from it must do.
READS = {"one_cold_read": Provider(read_once, "one cold read", GREY, exact=False)}
# Of an optimizer that trains a part: run(model, selection) makes step().
MASKED = {
    "fishkern": Provider(masked.fishkern, "", OURS),
    "six_lines": Provider(masked.six_lines, "six lines of torch", VERMILION),
    "masked_fused": Provider(masked.masked_fused, "masked gradients, fused AdamW", ORANGE, exact=False),
    "masked_foreach": Provider(masked.masked_foreach, "masked gradients, foreach AdamW", GREEN, exact=False),
    "dense_fused": Provider(masked.dense_fused, "everything, fused AdamW", GREY, exact=False),
}
_LISTS: tuple[Mapping[str, Provider], ...] = (PASSES, PARTS_OF_A_PASS, LAYERS, TOPK, READS, MASKED)
EVERY = {name: provider for providers in _LISTS for name, provider in providers.items()}


def runs(providers: Mapping[str, Provider], *names: str) -> dict[str, Callable[..., Any]]:
    """What some of them run, or all of a list."""
    return {name: providers[name].run for name in names or providers}


def squares(result: Any) -> dict[str, Tensor]:
    """Sums over examples of squared gradients; those of ``fishkern`` are means."""
    if isinstance(result, fk.Statistics):
        return {name: result.count * values for name, values in result.items()}
    return result
