"""The arms: what is trained, and which tokens are kept, in the order of their importance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

import fishkern as fk
from benchmarks.studies.tr_pts import controls
from benchmarks.studies.tr_pts.pictures import Batch, Pictures
from fishkern.hosts import is_head
from fishkern.selection.base import exactly
from fishkern.tokens import TokenReduction

RANK, TARGETS = 8, ("q_proj", "v_proj")  # of LoRA
KEEP, KEEP_FEW = 0.95, 0.7


@dataclass(frozen=True)
class Prepared:
    """What an arm trains.

    Args:
        model: With adapters, where the arm has any.
        selection: What trains of its parameters.
        reduction: Which tokens are kept, in training and in evaluation; None: all.
    """

    model: nn.Module
    selection: fk.Selection
    reduction: TokenReduction | None = None


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Args:
        says: What it is, in one line.
        make: From model, task and seed.
        rates: Which learning rates it tries: those of ``Setting.rates`` by this name. They are for what trains beside
            the classifier, or for the classifier alone (``"head"``).
    """

    says: str
    make: Callable[[nn.Module, Pictures, int], Prepared]
    rates: str = field(default="few", kw_only=True)


def relevance(model: nn.Module, task: Pictures, **options) -> fk.TaskRelevance:
    """What TR-PTS selects: its result for the training rows."""
    return fk.tr_pts(model, task.ranked(), top=task.setting.top, **options)


def ours(keep: float | None = None, place: controls.Place | None = None) -> Callable:
    """TR-PTS; ``place`` puts the token reduction elsewhere than in the layers that train the fewest connections."""

    def make(model: nn.Module, task: Pictures, seed: int) -> Prepared:
        result = relevance(model, task, keep=keep)
        reduction = result.reduction
        if place is not None:
            reduction = TokenReduction(place(result, seed), keep=keep)
        return Prepared(model, result.selection, reduction)

    return make


def parts(model: nn.Module) -> tuple[list[str], list[str]]:
    """The names of what every sparse arm ranks, and of what it trains whole: biases of linear maps, and the head.

    Norms, layer scales and positions are in neither, as in GPS.
    """
    ranked, whole = [], []
    for path, module in model.named_modules():
        for name, _ in module.named_parameters(prefix=path, recurse=False):
            if is_head(name):
                whole.append(name)
            elif isinstance(module, nn.Linear | nn.Conv2d):
                (whole if name.endswith("bias") else ranked).append(name)
    return ranked, whole


def chosen(model: nn.Module, scores: Mapping[str, Tensor], rule: fk.Rule) -> fk.Selection:
    """Select by the scores of what is ranked, beside what every sparse arm trains whole."""
    _, whole = parts(model)
    return whole_of(model, whole.__contains__) | fk.select(scores, rule)


def fisher(model: nn.Module, task: Pictures) -> fk.Statistics:
    """Of what is ranked, on all training rows."""
    ranked, _ = parts(model)
    return fk.estimate(model, task.ranked(), parameters=exactly(ranked))


def whole_of(model: nn.Module, wanted: Callable[[str], bool]) -> fk.Selection:
    pool = {name: value.shape for name, value in model.named_parameters() if value.requires_grad}
    return fk.Selection(pool, {}, whole=[name for name in pool if wanted(name)])


def head(model: nn.Module, task: Pictures, seed: int) -> Prepared:
    return Prepared(model, whole_of(model, is_head))


def full(model: nn.Module, task: Pictures, seed: int) -> Prepared:
    return Prepared(model, whole_of(model, lambda name: True))


def bitfit(model: nn.Module, task: Pictures, seed: int) -> Prepared:
    return Prepared(model, whole_of(model, lambda name: name.endswith("bias") or is_head(name)))


def lora(model: nn.Module, task: Pictures, seed: int) -> Prepared:
    import peft

    options = dict(r=RANK, lora_alpha=RANK, target_modules=list(TARGETS), modules_to_save=["classifier"])
    model = peft.get_peft_model(model, peft.LoraConfig(**options))
    return Prepared(model, whole_of(model, lambda name: True))


def per_row(k: int) -> Callable:
    def make(model: nn.Module, task: Pictures, seed: int) -> Prepared:
        return Prepared(model, chosen(model, fisher(model, task), fk.PerRowTopK(k)))

    return make


def gps(model: nn.Module, task: Pictures, seed: int) -> Prepared:
    return Prepared(model, chosen(model, summed_gradients(model, task.ranked()), fk.PerRowTopK(1)))


def summed_gradients(model: nn.Module, batches: list[Batch]) -> dict[str, Tensor]:
    """``|sum of gradients|`` of what is ranked; examples cancel in it, which they do not in the Fisher."""
    for batch in batches:
        (model(**batch).loss * len(batch["labels"])).backward()
    ranked, _ = parts(model)
    sums = {name: model.get_parameter(name).grad.abs() for name in ranked}
    model.zero_grad()
    return sums


def random_rows(model: nn.Module, task: Pictures, seed: int) -> Prepared:
    selection = relevance(model, task, keep=None).selection
    return Prepared(model, controls.same_counts(selection, seed))


def global_topk(model: nn.Module, task: Pictures, seed: int) -> Prepared:
    ranked, _ = parts(model)
    counts = relevance(model, task, keep=None).selection.counts
    count = sum(counts[name] for name in ranked)
    return Prepared(model, chosen(model, fisher(model, task), fk.GlobalTopK(count)))


def head_tokens(model: nn.Module, task: Pictures, seed: int) -> Prepared:
    return Prepared(model, whole_of(model, is_head), relevance(model, task, keep=KEEP).reduction)


ARMS = {
    "head": Arm("the classifier alone", head, rates="head"),
    "full": Arm("all parameters", full, rates="whole"),
    "per-row": Arm("one connection of each neuron, by the Fisher", per_row(1)),
    "contribution": Arm("TR-PTS's connections, all tokens", ours()),
    "tr-pts": Arm("TR-PTS: these, and keep 0.95 where the fewest connections train", ours(KEEP)),
    "random": Arm("control: as many connections of each neuron as TR-PTS, by chance", random_rows),
    "gps": Arm("GPS's rule: one connection of each neuron, by |sum of gradients|", gps),
    "lora": Arm(f"LoRA of rank {RANK} on queries and values", lora, rates="lora"),
    "bitfit": Arm("all biases", bitfit),
    "global": Arm("control: as many connections as TR-PTS, the largest Fisher anywhere", global_topk),
    "tr-pts-0.7": Arm("TR-PTS, keep 0.7", ours(KEEP_FEW)),
    "dense": Arm("control: keep 0.95 where the most connections train", ours(KEEP, controls.densest)),
    "drawn": Arm("control: keep 0.95 in layers drawn by chance", ours(KEEP, controls.drawn)),
    "dense-0.7": Arm("control: keep 0.7 where the most connections train", ours(KEEP_FEW, controls.densest)),
    "drawn-0.7": Arm("control: keep 0.7 in layers drawn by chance", ours(KEEP_FEW, controls.drawn)),
    "head-tokens": Arm("the classifier alone, keep 0.95 where TR-PTS has it", head_tokens, rates="head"),
    "per-row-2": Arm("two connections of each neuron, by the Fisher", per_row(2)),
}
"""Each trains the classifier as well. The sparse ones also train the biases of linear maps, as GPS does; norms and
positions stay."""
