"""``estimate``: a model and batches in, statistics out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fishkern import backend as backends
from fishkern import hosts
from fishkern.backend import Backend
from fishkern.layers import (
    UnsupportedModuleError,
    gradient_kept,
    has_gradient_dtype,
    is_wrapped,
    scored_tensors,
    stored_weights,
    weight_shape,
)
from fishkern.statistics.accumulators import Accumulators
from fishkern.statistics.answering import Answering, LossFunction
from fishkern.statistics.base import Estimator
from fishkern.statistics.coverage import Covered, slowest_paths
from fishkern.statistics.data import Data, Progress
from fishkern.statistics.diagonal_fisher import DiagonalFisher
from fishkern.statistics.likelihood import Likelihood
from fishkern.statistics.passes import GradientPass, PerExamplePass
from fishkern.statistics.result import Statistics
from fishkern.statistics.shards import Ranks

Predicate = Callable[[str, nn.Parameter], bool]


def estimate(
    model: nn.Module,
    batches: Iterable[Any],
    estimator: Estimator | None = None,
    *,
    likelihood: Likelihood | LossFunction | None = None,
    parameters: Predicate | Literal["all"] | None = None,
    max_examples: int | None = None,
    accumulate_on: str | torch.device | None = None,
    check: bool = True,
    backend: Backend | None = None,
    progress: bool | Callable[[int, int | None], None] = False,
) -> Statistics:
    """Estimate a statistic of a model's gradients over data.

    The model runs in evaluation mode (activation checkpointing stays on). Its modes, ``requires_grad``, ``.grad``,
    hooks and the random number generators are left as found, also after an exception. Before the first batch, two
    examples run through capture and through ordinary autograd; a parameter on which they differ takes a slower exact
    path, and says so.

    Under an initialised process group every rank estimates on its own part of the data, as a ``DistributedSampler`` or
    accelerate deals it; sums and counts are reduced, examples that the sampler repeats to even out the ranks count
    once, and every rank gets the same statistics.

    Cost of the default: one forward and one backward pass, without the weights' ordinary gradients; memory for one
    float32 accumulator of each parameter asked for, besides what a training step keeps of activations.

    Args:
        model: A module; wrappers (DDP, ``torch.compile``) are looked through.
        batches: What a ``DataLoader`` yields: mappings (keyword arguments of the model) or ``(inputs, labels)``, every
            tensor with the example axis first; moved to the model's device.
        estimator: The recipe; ``None`` for :class:`DiagonalFisher`, the exact per-example empirical Fisher.
        likelihood: The loss of an example. ``None``: recognised from a transformers model. A :class:`Likelihood`. Or a
            function ``(model, batch) -> losses [N]``, which gives the empirical Fisher only.
        parameters: ``None``: every parameter with ``requires_grad``. ``"all"``: every parameter, also those stored as
            integers, float8 or in packed form by a quantised linear, whose key is ``<module>.weight`` and whose shape
            is ``[O, I]``. Or a predicate of canonical name and parameter (for such a weight: the tensor that stores
            it).
        max_examples: Stop after so many examples, of all ranks together.
        accumulate_on: Device of the accumulators; ``None`` for each parameter's own.
        check: Whether to run the comparison with ordinary autograd; a parameter used past its module's call is found
            by it alone.
        backend: ``None`` for the ambient choice, see :mod:`fishkern.backend`.
        progress: ``True`` writes a line to standard error; or a function of the number of examples done and of the
            total, where known.

    Returns:
        The mean over examples, with what was covered by which path.

    Raises:
        TypeError: A batch is neither a mapping nor a pair.
        ValueError: No data, no trainable parameter, labels missing, a loss not finite, or a loss that is not the
            model's own.
        UnsupportedModuleError: A module cannot be served exactly; the message names it and the way round.
        RuntimeError: It runs under ``torch.inference_mode()``; another rank has failed, or was asked for other
            parameters.
    """  # noqa: DOC502
    estimator = DiagonalFisher() if estimator is None else estimator
    model = hosts.unwrap(model)
    _refuse(model, estimator, max_examples)
    chosen = _chosen(model, parameters)
    stored = {key: weight_shape(module) for key, (_, module) in stored_weights(model).items()}
    _refuse_without_gradient(stored, chosen, estimator)
    shapes = {key: stored.get(key, parameter.shape) for key, parameter in chosen.items()}
    accumulators = Accumulators(
        shapes,
        {key: torch.device(accumulate_on or parameter.device) for key, parameter in chosen.items()},
        {key: torch.promote_types(_gradient_dtype(parameter), torch.float32) for key, parameter in chosen.items()},
        estimator,
        backends.current() if backend is None else backend,
    )
    device = next(iter(chosen.values())).device
    ranks = Ranks()
    ranks.demand_equal({key: tuple(shape) for key, shape in shapes.items()}, "the parameters to estimate")
    data = Data(batches, device, max_examples, ranks)
    report = Progress(progress if ranks.rank == 0 else False, data.total)
    answering = Answering(model, likelihood)
    with ranks.failing_together(), _as_found(model):
        way: GradientPass | PerExamplePass
        if estimator.per_example:
            way = PerExamplePass(model, chosen, answering, estimator, accumulators, check)
        else:
            path = "batch" if estimator.definition["unit"] == "batch" else "sketch"
            way = GradientPass(chosen, answering, estimator, accumulators, path)
        units = 0
        for batch, examples in data:
            with _own_randomness(device):
                if data.batches == 1:
                    answering.prepare(batch)
                way.run(batch, examples)
            units += estimator.units(len(examples))
            report(data.examples)
    report.close()
    counts = [sum(found) for found in zip(*ranks.gathered((units, data.examples, data.batches)), strict=True)]
    units, num_examples, num_batches = counts
    if not units:
        raise ValueError("the data holds no example: batches was empty (an exhausted iterator, or max_examples=0).")
    if not any(ranks.gathered(accumulators.touched)):
        raise ValueError(
            f"the loss depends on none of the {len(chosen)} parameters asked for ({', '.join(list(chosen)[:3])}, ...): "
            "it was computed without gradients, or these parameters are not used."
        )
    tensors = {}
    for key in chosen:
        ranks.sum_(state := accumulators.states.pop(key))
        tensors[key] = estimator.result(state, units)
        if not tensors[key].isfinite().all():
            raise ValueError(
                f"the statistic of {key} is not finite although every loss is: its gradients overflow in "
                f"{chosen[key].dtype}. Run the model in float32 or bfloat16."
            )
    definition = {**estimator.definition, "likelihood": answering.description}
    run = {
        "model": type(model).__name__,
        "dtype": sorted({str(parameter.dtype).removeprefix("torch.") for parameter in chosen.values()}),
        "examples": num_examples,
        "batches": num_batches,
        **({"ranks": ranks.count} if ranks.count > 1 else {}),
        "checked": check if estimator.per_example else None,
        "torch": torch.__version__,
        **estimator.settings,
    }
    coverage = _coverage(model, chosen, slowest_paths(ranks.gathered(way.paths)), parameters)
    return Statistics(
        tensors, count=units, provenance={"definition": definition, "runs": [run]}, coverage=coverage
    )


def _refuse(model: nn.Module, estimator: Estimator, max_examples: int | None) -> None:
    if not isinstance(estimator, Estimator):
        raise TypeError(f"estimator must be an Estimator such as DiagonalFisher(), got {estimator!r}.")
    if torch.is_inference_mode_enabled() or any(parameter.is_inference() for parameter in model.parameters()):
        raise RuntimeError(
            "estimate takes gradients, which torch.inference_mode() rules out, also for parameters made under it: call "
            "it, and load the model, outside (torch.no_grad() does no harm)."
        )
    if reason := hosts.sharded(model) or hosts.lost_prefix(model):
        raise UnsupportedModuleError(f"{reason}.")
    if reason := hosts.dispatched(model):
        raise UnsupportedModuleError(
            f"{type(model).__name__} cannot be estimated as it is dispatched: {reason}. Load it onto one device, "
            "without device_map='auto'."
        )
    if max_examples is not None and max_examples < 1:
        raise ValueError(f"max_examples must be at least 1, got {max_examples}.")
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not module.track_running_stats:
            raise UnsupportedModuleError(
                f"{name!r} ({type(module).__name__}) keeps no running statistics, so it normalises each example by the "
                "others of its batch, and no example has a gradient of its own."
            )


def _chosen(model: nn.Module, which: Predicate | Literal["all"] | None) -> dict[str, Tensor]:
    named = scored_tensors(model)
    if which is None:
        chosen = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    elif which == "all":
        chosen = named
    elif callable(which):
        chosen = {name: parameter for name, parameter in named.items() if which(name, parameter)}
    else:
        raise TypeError(f"parameters must be None, 'all' or a predicate (name, parameter) -> bool, got {which!r}.")
    if not chosen:
        why = "none of them requires a gradient" if which is None else "the predicate took none of them"
        raise ValueError(
            f"{type(model).__name__} has {len(named)} parameters, and {why}. Pass parameters='all' or a predicate."
        )
    return chosen


def _refuse_without_gradient(
    stored: Mapping[str, torch.Size], chosen: Mapping[str, Tensor], estimator: Estimator
) -> None:
    """Refuse what autograd does not differentiate, except in a quantised linear whose gradients are captured."""
    without = {
        key: parameter
        for key, parameter in chosen.items()
        if not has_gradient_dtype(parameter) or (key in stored and not is_wrapped(parameter))
    }
    if numbers := sorted(key for key, parameter in without.items() if parameter.is_complex()):
        raise UnsupportedModuleError(
            f"{numbers} are complex, and a Fisher of complex parameters is not defined here: leave them out with "
            "parameters=, or hold real and imaginary part as two real parameters."
        )
    if lost := sorted(key for key in without if not estimator.per_example or key not in stored):
        dtypes = sorted({str(without[key].dtype).removeprefix("torch.") for key in lost})
        raise UnsupportedModuleError(
            f"{lost} are stored as {', '.join(dtypes)}, so autograd gives them no gradient; only DiagonalFisher with "
            "unit='example' or 'position' serves such a weight, where it belongs to a quantised linear (a module with "
            "in_features, out_features and one stored weight). Leave them out with parameters=."
        )


def _gradient_dtype(parameter: Tensor) -> torch.dtype:
    """Name the dtype of a parameter's gradient; that of a stored weight is taken for float32."""
    return parameter.dtype if has_gradient_dtype(parameter) else torch.float32


def _coverage(
    model: nn.Module,
    chosen: Mapping[str, Tensor],
    paths: Mapping[str, tuple[str, str]],
    which: Predicate | Literal["all"] | None,
) -> dict[str, Covered]:
    by_whose_word = "requires_grad is False" if which is None else "the parameters argument"
    stored = stored_weights(model)
    coverage = {}
    for key, parameter in scored_tensors(model).items():
        path, reason = paths[key] if key in chosen else ("left out", by_whose_word)
        storage, module = stored.get(key, (key, None))
        numel = parameter.numel() if module is None else weight_shape(module).numel()
        coverage[key] = Covered(path, numel, reason)
        if storage != key:
            coverage[storage] = Covered("left out", 0, f"stored for {key}")
    return coverage


@contextmanager
def _as_found(model: nn.Module) -> Iterator[None]:
    """Freeze the model for a pass and restore what a pass touches."""
    parameters = list(model.parameters())
    found = [(parameter, parameter.requires_grad, parameter.grad) for parameter in parameters]
    with ExitStack() as stack:
        stack.enter_context(hosts.evaluation_mode(model))
        stack.enter_context(hosts.connected_inputs(model))
        stack.enter_context(gradient_kept(model))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.enable_grad())
        try:
            for parameter in parameters:
                parameter.grad = None
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter, required, grad in found:
                parameter.requires_grad_(required)
                parameter.grad = grad


@contextmanager
def _own_randomness(device: torch.device) -> Iterator[None]:
    """Leave the random number generators as they were; the data's own draws lie outside."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        yield
