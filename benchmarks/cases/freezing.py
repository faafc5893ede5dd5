"""What freezing saves of a training step: time, kept activations, FLOPs and state, on a small LLaMA.

The optimizer freezes the lowest layers and the embedding below them. A step is compared with the arithmetic of the
layers' part: a forward and two backward products cost the same, and the frozen fraction ``s`` of the layers keeps the
first, so at best the time is ``(1 + 2 (1 - s)) / 3`` and the activations are ``1 - s``. The layers' part is a step of
the whole model less the same step of the same model without layers (embedding, last norm, head and loss; the embedding
is frozen there where it is in the whole). All of them take turns within each round. FLOPs are counted as a step runs,
and are subtracted in the same way. A second test follows three events that freeze slices of rows and whole parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise
from statistics import median
from typing import NamedTuple

import pytest
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import fishkern as fk
from benchmarks.engine.flops import flops as counted
from benchmarks.engine.memory import MIB, peak_allocated, rounded
from benchmarks.engine.records import Record
from benchmarks.engine.turns import Run, seconds_of, spread, there_and_back
from benchmarks.subjects.transformers import Shape, Workload

TESTS = {"run": ["tests/optim", "tests/laws/test_optimizers.py"]}
CASE = Workload(Shape(8, 512, 1376, 512, 8), T=64, N=8, batches=1)
FROZEN = (0.25, 0.5, 0.75)  # of the layers, from the lowest on
ROUNDS = 9
WITHIN = 1.05  # of the arithmetic

pytestmark = pytest.mark.skipif(not hasattr(fk.MaskedOptimizer, "frozen"), reason="this fishkern freezes no parameters")


class Training(NamedTuple):
    """A model, the optimizer that trains it, and a batch."""

    model: nn.Module
    optimizer: fk.MaskedAdamW
    batch: dict[str, Tensor]

    def loss(self) -> Tensor:
        return self.model(**self.batch, use_cache=False).loss

    def step(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def training(case: Workload) -> Training:
    """Everything is trained, as ranges of rows, so that torch's fused update steps it before and after an event."""
    model = case.model().train()
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    ranges = {name: fk.Rows((0, shape[0])) for name, shape in shapes.items()}
    return Training(model, fk.MaskedAdamW(model, fk.Selection(shapes, {}, ranges=ranges), lr=1e-4), case.data()[0])


def with_lowest_frozen(case: Workload, layers: int) -> Training:
    """So many layers and what is below them do not train; without any, all is trained."""
    trained = training(case)
    trained.step()
    if layers or not case.shape.layers:
        below = ("model.embed_tokens.", *(f"model.layers.{number}." for number in range(layers)))
        freeze(trained, lambda name: name.startswith(below))
    return trained


def freeze(trained: Training, stops: Callable[[str], bool], rows: Callable[[str, int], fk.Rows] | None = None) -> None:
    """Freeze whole parameters by name, or these rows of them."""
    selection = trained.optimizer.selection
    stopping = {
        name: fk.Rows((0, shape[0])) if rows is None else rows(name, shape[0])
        for name, shape in selection.shapes.items()
        if stops(name)
    }
    trained.optimizer.reselect(selection - fk.Selection(selection.shapes, {}, ranges=stopping), freeze=True)


def without_layers(case: Workload) -> Workload:
    return replace(case, shape=replace(case.shape, layers=0))


def kept_bytes(trained: Training) -> int:
    """What autograd keeps of a forward pass for the backward pass, weights aside; memory that is shared counts once."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in trained.model.parameters()}
    kept: dict[int, Tensor] = {}  # the tensors, since memory that is free again may be given out twice

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.detach())
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = trained.loss()
    del loss
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in weights)


def flops(trained: Training) -> dict[str, int]:
    """Of matrix products, those of attention among them, forward and backward."""
    losses: list[Tensor] = []
    forward = counted(lambda: losses.append(trained.loss()))
    backward = counted(losses[0].backward)
    trained.optimizer.zero_grad()
    return {"forward": forward, "backward": backward}


def arithmetic(s: float) -> float:
    """The time of layers of which this fraction is frozen, if forward and both backward products cost the same."""
    return (1 + 2 * (1 - s)) / 3


class Part(NamedTuple):
    """What the layers take of a step: of the whole model, and of the same model without layers."""

    whole: Training
    rest: Training

    def of(self, measure: Callable[[Training], int]) -> int:
        return measure(self.whole) - measure(self.rest)

    def flops(self) -> dict[str, int]:
        whole, rest = flops(self.whole), flops(self.rest)
        return {name: whole[name] - rest[name] for name in whole}


def parts(case: Workload) -> dict[float, Part]:
    """By the frozen fraction of the layers, 0 included."""
    rest = {False: training(without_layers(case)), True: with_lowest_frozen(without_layers(case), 0)}
    rest[False].step()
    return {s: Part(with_lowest_frozen(case, int(s * case.shape.layers)), rest[s > 0]) for s in (0.0, *FROZEN)}


def description(quantity: str, case: Workload, **more: object) -> Record:
    """The fields of a record other than its figures."""
    shared = {"op": "freezing", "quantity": quantity, "case": case.fields, "attention": "sdpa", "dtype": case.dtype}
    return {**shared, "provider": "fishkern", **more}


def saved_of_layers(case: Workload, layers: Mapping[float, Part]) -> dict[float, Record]:
    """Activations and FLOPs of the layers' part, and their fractions of those without freezing."""
    activations = {s: part.of(kept_bytes) for s, part in layers.items()}
    flops_of = {s: part.flops() for s, part in layers.items()}
    total = {s: sum(both.values()) for s, both in flops_of.items()}
    return {
        s: {
            "activations_mib": round(activations[s] / MIB, 2),
            "activations_ratio": activations[s] / activations[0.0],
            "activations_at_best": 1 - s,
            "flops": flops_of[s],
            "flops_ratio": total[s] / total[0.0],
            "skipped_layers": skipped(part.whole),
            "state_mib": round(part.whole.optimizer.state_bytes / MIB, 2),
        }
        for s, part in layers.items()
    }


def skipped(trained: Training) -> int:
    """How many of the lowest layers are not back-propagated through."""
    (stack,) = fk.optim.training_cost(trained.optimizer, trained.model, trained.batch).skipped.values()
    return stack.count


def test_lowest_layers(benchmark, record):
    layers = parts(CASE)
    saved = saved_of_layers(CASE, layers)
    seconds = in_turns(benchmark, {(s, name): one.step for s, part in layers.items() for name, one in named(part)})
    own = {s: [a - b for a, b in zip(seconds[s, "whole"], seconds[s, "rest"], strict=True)] for s in layers}
    missed = []
    for s in layers:
        ratio = median(own[s]) / median(own[0.0])
        figures = {name: spread(seconds[s, name]) for name in ("whole", "rest")}
        record(
            "frozen_layers",
            {
                **description("layers", CASE, frozen=s),
                "seconds": spread(own[s]),
                "seconds_of": figures,
                "rounds": ROUNDS,
                "ratio": ratio,
                "ratio_at_best": arithmetic(s),
                **saved[s],
            },
        )
        benchmark.extra_info[f"{s} frozen"] = f"{ratio:.3f} of {arithmetic(s):.3f}"
        missed += [("time", s)] * (ratio > WITHIN * arithmetic(s))
        missed += [("activations", s)] * (saved[s]["activations_ratio"] > WITHIN * (1 - s))
    assert missed == []


def named(part: Part) -> list[tuple[str, Training]]:
    return [("whole", part.whole), ("rest", part.rest)]


def in_turns(benchmark, steps: Mapping[object, Run]) -> dict[object, list[float]]:
    """Each once in a round, after one that is not counted, in the order of the round before backwards."""
    for step in steps.values():
        step()
    return benchmark.pedantic(there_and_back, args=(steps, ROUNDS, seconds_of), rounds=1)


# What stops at each of three events: whole parameters, and quarters of the rows of the others.
def first_event(trained: Training) -> None:
    """A quarter of the rows of all matrices of the layers, and the embedding."""
    freeze(trained, lambda name: "proj" in name, lambda name, size: fk.Rows((0, size // 4)))
    freeze(trained, lambda name: "embed_tokens" in name)


def second_event(trained: Training) -> None:
    """Half of the rows of all feed-forward matrices, and the attention of the lower half of the layers."""
    half = trained.model.config.num_hidden_layers // 2
    freeze(trained, lambda name: "mlp" in name, lambda name, size: fk.Rows((size // 4, 3 * size // 4)))
    freeze(trained, lambda name: "self_attn" in name and number_of(name) < half)


def third_event(trained: Training) -> None:
    """The lower half of the layers."""
    half = trained.model.config.num_hidden_layers // 2
    freeze(trained, lambda name: name.startswith("model.layers.") and number_of(name) < half)


EVENTS = (first_event, second_event, third_event)


def number_of(name: str) -> int:
    return int(name.split(".")[2])


def after_events(case: Workload) -> list[Training]:
    """A training before all events, and one after each."""
    stages = []
    for count in range(len(EVENTS) + 1):
        trained = training(case)
        trained.step()
        for event in EVENTS[:count]:
            event(trained)
        stages.append(trained)
    return stages


def costs(trained: Training) -> Record:
    """What a step costs, without its time. The step after an event, which makes the state anew, is over then."""
    trained.step()
    cost = fk.optim.training_cost(trained.optimizer, trained.model, trained.batch)
    own = {"entries": cost.entries, "of": cost.total, "frozen_parameters": len(cost.frozen)}
    memory = {"state_mib": cost.state_bytes / MIB, "activations_mib": kept_bytes(trained) / MIB}
    memory["peak_mib"] = peak_allocated(trained.step) / MIB  # above weights and state, which are there before a step
    return {**own, "skipped_layers": skipped(trained), **rounded(memory), "flops": flops(trained)}


def test_events(benchmark, record):
    stages = after_events(CASE)
    saved = [costs(trained) for trained in stages]
    seconds = in_turns(benchmark, dict(enumerate(trained.step for trained in stages)))
    for count, figures in enumerate(saved):
        own = {"event": count, "what": " ".join((EVENTS[count - 1].__doc__ or "").split()) if count else "none yet"}
        record("frozen_layers", {**description("events", CASE, **own), "seconds": spread(seconds[count]), **figures})
        benchmark.extra_info[f"event {count}"] = round(1e3 * median(seconds[count]), 1)
    for name in ("entries", "state_mib"):
        assert all(later[name] < before[name] for before, later in pairwise(saved))
    backward = [figures["flops"]["backward"] for figures in saved]
    assert backward[3] < backward[2] < backward[1] == backward[0]  # slices of rows save no product
    assert saved[3]["peak_mib"] < saved[2]["peak_mib"] < saved[0]["peak_mib"]
    assert median(seconds[3]) < median(seconds[0])


def compared() -> dict[str, dict[str, Callable[[], Run]]]:
    """For ``python -m benchmarks compare``."""
    if not hasattr(fk.MaskedOptimizer, "frozen"):
        return {}

    def make(s: float) -> Run:
        return with_lowest_frozen(CASE, int(s * CASE.shape.layers)).step

    return {f"frozen={s}": {"fishkern": partial(make, s)} for s in (0.0, *FROZEN)}
