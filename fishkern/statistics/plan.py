"""``plan``: what a pass over data will take, before it runs: bytes, passes and the path of each parameter."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fishkern import hosts
from fishkern.layers import is_wrapped, linear_maps
from fishkern.names import listed
from fishkern.statistics.answering import Answering
from fishkern.statistics.base import Estimator
from fishkern.statistics.batches import Examples, Shared
from fishkern.statistics.choosing import Requested
from fishkern.statistics.coverage import ONLY_A_RUN
from fishkern.statistics.diagonal_fisher import DiagonalFisher
from fishkern.statistics.drawn import Drawn, LossFunction
from fishkern.statistics.likelihood import Likelihood
from fishkern.statistics.request import check_estimable, parameter_infos, reader_for, requested_tensors

if TYPE_CHECKING:
    from fishkern.statistics.rehearsal import Rehearsal
    from fishkern.statistics.valueless import Valueless


@dataclass(frozen=True, eq=False)
class PassPlan:
    """What a pass will take on one device. ``print(plan)`` shows it as a table.

    Args:
        model: Class of the model.
        estimator: Class of the estimator.
        weight_bytes: Bytes of the model's parameters and buffers; shared ones count once.
        accumulator_bytes: Bytes of the estimator's sums in one pass.
        basis_bytes: Bytes of its constants, such as the bases of the layers of one pass.
        activation_bytes: The most bytes beside these while a batch runs: what autograd and the capture keep of a
            forward pass, and temporaries. ``None`` without a batch.
        phases: The most bytes above the loaded model in each part of a pass, by name, in order.
        paths: The path that computes each parameter, by canonical name: ``"fused"``, ``"sketch"``, ``"batch"``, or
            ``"only a run can tell"``.
        passes: Number of passes over the data.
        flops: FLOPs of matrix products, convolutions and attention for one batch: ``"pass"``, and of these
            ``"estimator"``, its own operations; and ``"set-up"``, once.
        examples: ``N`` of the batch; 0 without one.
        unknown: What only a run can tell, in words.
        logits: How logits above the limit of the likelihood are computed (:class:`fishkern.CausalLM`), in words; empty
            if they are below it, or there is no limit.
    """

    model: str
    estimator: str
    weight_bytes: int
    accumulator_bytes: int
    basis_bytes: int
    activation_bytes: int | None
    phases: Mapping[str, int]
    paths: Mapping[str, str]
    passes: int
    flops: Mapping[str, int]
    examples: int
    unknown: tuple[str, ...]
    logits: str = ""

    @property
    def peak_bytes(self) -> int:
        """The most bytes above the loaded model, over all parts of the pass."""
        return max(self.phases.values())

    @property
    def total_bytes(self) -> int:
        """The most bytes, those of the model included."""
        return self.weight_bytes + self.peak_bytes

    def __str__(self) -> str:
        longest = max(self.phases, key=self.phases.__getitem__)
        batch = f"beside these, for a batch of {self.examples}" if self.examples else "unknown without a batch"
        rows = [
            ("weights", self.weight_bytes, "parameters and buffers"),
            ("accumulators", self.accumulator_bytes, "the sums of the estimator"),
            ("bases", self.basis_bytes, "what it keeps of the weights"),
            ("activations", self.activation_bytes, batch),
            ("peak", self.peak_bytes, f"above the weights ({longest})"),
            ("total", self.total_bytes, "weights and peak"),
        ]
        lines = [f"{self.estimator} of {self.model}: {self.passes} pass{'es' * (self.passes > 1)} over the data"]
        lines += [f"  {name:<13}{bytes_in_words(size):>10}  {what}" for name, size, what in rows]
        counts = Counter(self.paths.values())
        lines += ["paths: " + ", ".join(f"{path} {count}" for path, count in counts.items())]
        if self.examples:
            whole, own = self.flops["pass"], self.flops["estimator"]
            lines += [f"FLOPs of a batch: {whole:.2e}, of which {own:.2e} by the estimator"]
        lines += [f"logits: {self.logits}"] if self.logits else []
        return "\n".join([*lines, f"{ONLY_A_RUN}:", *(f"  - {one}" for one in self.unknown)])


def plan(
    model: nn.Module,
    batch: Any = None,
    estimator: Estimator | None = None,
    *,
    likelihood: Likelihood | LossFunction | Drawn | None = None,
    parameters: Requested = None,
    accumulate_on: str | torch.device | None = None,
    check: bool = True,
    shared: Shared = None,
) -> PassPlan:
    """Plan a pass of :func:`fishkern.estimate`: its bytes on one device, its passes, the path of each parameter.

    The pass is rehearsed on tensors without values, which take no memory: its own code runs, from the set-up to the
    results, and the bytes that are alive are counted at every operation. So the model may be on the meta device, where
    it is planned as on a CPU; of a model on another device nothing is computed. It is left as found.

    What a plan does not contain is said in ``unknown``: the scratch of kernels and libraries, and whatever depends on
    values, such as how many tokens a router sends to an expert.

    Args:
        model: A module, on any device; wrappers (DDP, ``torch.compile``) are removed.
        batch: One batch as :func:`fishkern.estimate` takes it, on any device. Of its floating tensors only the shapes
            are read. Its integers (tokens, labels, masks) may matter, and are ones if they are on the meta device.
            ``None``: no activations are planned.
        estimator: The recipe; ``None`` for :class:`fishkern.DiagonalFisher`.
        likelihood: As for :func:`fishkern.estimate`.
        parameters: As for :func:`fishkern.estimate`.
        accumulate_on: As for :func:`fishkern.estimate`. Accumulators elsewhere are left out of the peak, but for the
            largest, whose additions are made on the model's device.
        check: As for :func:`fishkern.estimate`.
        shared: As for :func:`fishkern.estimate`.

    Returns:
        The plan.

    Raises:
        TypeError: The batch is neither a mapping nor a pair, or an argument is of another type than described.
        ValueError: There are no trainable parameters or no labels, or an entry of the batch cannot be assigned to
            examples; or the rows of the batch are packed.
        UnsupportedModuleError: The gradients of a module cannot be exact; the message says how to avoid it.
        RuntimeError: It runs under ``torch.inference_mode()``.
    """
    # not at the top: torch's tensors without values are no public part of it
    from fishkern.statistics.valueless import Valueless, device_of

    estimator = DiagonalFisher() if estimator is None else estimator
    model = hosts.unwrap(model)
    check_estimable(model, estimator, on_meta=True)
    weight_bytes = sum(map(_nbytes, [*model.parameters(), *model.buffers()]))
    maps = linear_maps(model) if estimator.reads_factors else {}
    first = next(iter(requested_tensors(model, parameters, estimator, maps).values()))
    device = device_of(first)
    mode = Valueless()
    examples = None
    if batch is not None:
        examples = reader_for(model, likelihood, shared)(batch, 0)
        if examples.documents is not None:
            raise ValueError(
                "the batch has packed rows, and where their documents end is read off values, which a plan does not "
                "have. Leave out what says so ('position_ids', 'seq_idx', 'cu_seq_lens_q'): a row is then planned as "
                "one example."
            )
        examples = examples.with_tensors(lambda tensor: mode.input_like(tensor, device))
    elsewhere = accumulate_on is not None and not _is(first.device, torch.device(accumulate_on))
    with torch.random.fork_rng([device] if device.type == "cuda" else []), mode.model(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values, which there are none of
        rehearsals = _rehearsed(mode, model, parameters, estimator, likelihood, examples, check=check)
    return _planned(model, estimator, rehearsals, weight_bytes, examples, elsewhere=elsewhere)


def _rehearsed(
    mode: Valueless,
    model: nn.Module,
    parameters: Requested,
    estimator: Estimator,
    likelihood: Likelihood | LossFunction | Drawn | None,
    examples: Examples | None,
    *,
    check: bool,
) -> list[Rehearsal]:
    """Rehearse each pass over the data, while the results of those before it are alive."""
    from fishkern.statistics.rehearsal import Rehearsal

    maps = linear_maps(model) if estimator.reads_factors else {}
    requested = requested_tensors(model, parameters, estimator, maps)
    infos = parameter_infos(model, requested, estimator, None, maps)
    answering = Answering(model, likelihood)
    rehearsals: list[Rehearsal] = []
    results: dict[str, Any] = {}
    for names in estimator.passes(tuple(requested)):
        part = {name: requested[name] for name in names}
        part_infos = {name: infos.pop(name) for name in names}
        rehearsals.append(Rehearsal(mode, model, part, part_infos, estimator, answering, check))
        results |= rehearsals[-1].over(examples)
    return rehearsals


def _planned(
    model: nn.Module,
    estimator: Estimator,
    rehearsals: list[Rehearsal],
    weight_bytes: int,
    examples: Examples | None,
    *,
    elsewhere: bool,
) -> PassPlan:
    """Combine the passes: bytes are those of the pass that takes the most."""
    phases: dict[str, int] = {}
    paths: dict[str, tuple[str, str]] = {}
    activations: list[int] = []
    flops = {"pass": 0, "estimator": 0, "set-up": 0}
    for one in rehearsals:
        sizes = one.sums_of.values()
        # sums of one parameter at a time are made where its gradients are, and move to where the accumulators are
        outside = sum(sizes) - max(sizes) if elsewhere else 0
        for name, phase in one.phases.items():
            phases[name] = max(phases.get(name, 0), phase.peak - outside)
            flops["pass" if name == "batch" else "set-up"] += phase.flops
            if name not in ("states", "results"):
                activations.append(phase.peak - one.states)
        flops["estimator"] += one.estimating
        paths |= one.paths
    return PassPlan(
        model=type(model).__name__,
        estimator=type(estimator).__name__,
        weight_bytes=weight_bytes,
        accumulator_bytes=max(sum(one.sums_of.values()) for one in rehearsals),
        basis_bytes=max(one.bases for one in rehearsals),
        activation_bytes=max(activations, default=None),
        phases=phases,
        paths={key: path for key, (path, _) in paths.items()},
        passes=len(rehearsals),
        flops=flops,
        examples=examples.num_examples if examples else 0,
        unknown=tuple(_unknown(model, rehearsals, paths, examples)),
        logits=next((said for one in rehearsals if (said := one.answering.said_of_logits)), ""),
    )


def _unknown(
    model: nn.Module, rehearsals: list[Rehearsal], paths: Mapping[str, tuple[str, str]], examples: Examples | None
) -> Iterator[str]:
    """Say what the plan does not contain."""
    if examples is None:
        yield "activations, since there is no batch"
    reasons: dict[str, list[str]] = {}
    for key, (path, reason) in paths.items():
        if path == ONLY_A_RUN:
            reasons.setdefault(reason, []).append(key)
    for reason, keys in reasons.items():
        yield f"the path of {listed(keys)}: {reason}"
    yield from dict.fromkeys(words for one in rehearsals for words in one.unknown)
    if any(parameter.is_meta for parameter in model.parameters()):
        yield "which attention and which kernels another device than a CPU takes, since the model is on the meta device"
    yield "what kernels and libraries take beside their results, and the slack of the allocator"


def _is(device: torch.device, named: torch.device) -> bool:
    """Tell whether a tensor's device is what a user names; an accelerator without a number is the current one."""
    if device.type != named.type or device.type in ("cpu", "meta"):
        return device.type == named.type
    return device.index == (torch.accelerator.current_device_index() if named.index is None else named.index)


def _nbytes(tensor: Tensor) -> int:
    """Count the bytes of a tensor; a subclass with its own arithmetic is made of others."""
    if not is_wrapped(tensor) or not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    return sum(_nbytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])


def bytes_in_words(size: int | None) -> str:
    """Write a number of bytes in the unit that fits.

    Args:
        size: Bytes; ``None`` where they are not known.

    Returns:
        Such as ``"12 B"`` or ``"3.5 MiB"``; ``"-"`` for ``None``.
    """
    if size is None:
        return "-"
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
