"""``prepare``: what a pass over data does before its first batch, done once for many passes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from torch import Tensor, nn

from fishkern import backend as backends
from fishkern import hosts
from fishkern.backend import Backend
from fishkern.layers import UnsupportedModuleError, scored_tensors
from fishkern.statistics.answering import Answering
from fishkern.statistics.base import Estimator
from fishkern.statistics.batches import Examples, Reader, Shared
from fishkern.statistics.choosing import Requested
from fishkern.statistics.division import Division
from fishkern.statistics.drawn import Drawn, LossFunction
from fishkern.statistics.known import Known
from fishkern.statistics.likelihood import Likelihood
from fishkern.statistics.likelihood_argument import described
from fishkern.statistics.notes import note_own_tokens
from fishkern.statistics.request import Options, Request, reader_for, request_of
from fishkern.statistics.sharded_pass import check_sharded
from fishkern.statistics.sharding import Sharding, sharding_of
from fishkern.statistics.shards import Ranks
from fishkern.statistics.storage import Where
from fishkern.statistics.structure import Facts, Labelled, demand_same, facts_of_model


class Prepared:
    """A prepared pass, from :func:`prepare`; :func:`fishkern.estimate` takes it as ``prepared=``.

    It belongs to one model object, in one process: it has no file, and is neither copied nor pickled. It refers to the
    model, and keeps no batch, no activation, no gradient and no hook.

    Attributes:
        estimator: The recipe that it was prepared for.
        parameters: Canonical names of the requested parameters, in the model's order.
        paths: The path of each of them on the first examples: ``"fused"``, ``"generic"``, ``"loop"``, ``"sketch"`` or
            ``"batch"``.
        checked: Whether they were compared with ordinary autograd.
        answering: Runs the model on a batch; its loss has been checked.
        known: What was found out for each pass over the data.
        withheld: Entries of the batch that the model does not get.
    """

    def __init__(
        self,
        request: Request,
        options: Options,
        answering: Answering,
        known: Sequence[Known],
        paths: Mapping[str, tuple[str, str]],
        withheld: set[str],
    ) -> None:
        self._options = options
        self._facts_of_model = facts_of_model(request.model)
        self._facts_of_request = _facts_of_request(request, options)
        self.estimator = request.estimator
        self.parameters = list(request.tensors)
        self.paths = {name: paths[name][0] for name in self.parameters}
        self.checked = options.check
        self.answering = answering
        self.known = list(known)
        self.withheld = withheld

    def __repr__(self) -> str:
        paths = ", ".join(f"{count} {path}" for path, count in Counter(self.paths.values()).items())
        return f"Prepared({type(self.estimator).__name__}, {len(self.parameters)} parameters: {paths})"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a prepared pass belongs to one model object in one process, so it is neither pickled nor copied: call "
            "fishkern.prepare(model, batch, ...) where the model is."
        )

    def completed(self, options: Options) -> Options:
        """Complete the arguments of a call by those that it was prepared with.

        Args:
            options: As the caller gave them.

        Returns:
            The arguments in force.
        """
        own = self._options
        given = {name: value for name, value in vars(options).items() if value is not None and name != "check"}
        if options.likelihood is not None and options.likelihood == self.answering.likelihood:
            del given["likelihood"]  # the one that was recognised
        return replace(own, **given)

    def demand_model(self, model: nn.Module) -> None:
        """Refuse a model for which it was not prepared.

        Args:
            model: Without running wrappers.

        Raises:
            ValueError: It is another model, or its structure has changed; the message says in what.
        """
        demand_same(self._facts_of_model, facts_of_model(model))

    def demand_request(self, request: Request, options: Options) -> None:
        """Refuse a request for which it was not prepared.

        Args:
            request: The request of a call.
            options: Its arguments.

        Raises:
            ValueError: It asks for something else; the message says for what.
        """
        demand_same(self._facts_of_request, _facts_of_request(request, options))


def prepare(
    model: nn.Module,
    batch: Any,
    estimator: Estimator | None = None,
    *,
    likelihood: Likelihood | LossFunction | Drawn | None = None,
    parameters: Requested = None,
    accumulate_on: Where = None,
    check: bool = True,
    backend: Backend | None = None,
    shared: Shared = None,
) -> Prepared:
    """Prepare passes of :func:`fishkern.estimate` over one model, whose weights change from pass to pass.

    What a pass does before its first batch is done here: the survey of the modules, the comparison with ordinary
    autograd, that with the model's own loss, and whether the examples are independent. ``estimate(model, batches,
    prepared=...)`` then reads the batches and nothing else. It gives the same as a call without it, wherever that one's
    checks would have come to the same, up to the rounding of sums: without it, the first two examples are added apart
    from the rest of their batch, since they have been run before.

    Data are **seen** if the first two examples of the first batch, padding included, equal value for value those of
    this batch or of an earlier pass (the first one, if that batch holds one). On other data these two run once more, to
    see whether they are independent and which rows are whose: three forward and two backward passes of at most two
    examples. Entries other than tensors, arrays and single values are not compared, and count as other data. So do the
    same examples under activation checkpointing where there was none before.

    Only values of weights may change, in place or by new tensors, and training modes. Whatever else is found changed is
    refused by name: adapters in force, config, modules, their hooks (by the names of the functions) and
    checkpointing, and of parameters names, shapes, dtypes, devices, ``requires_grad`` and ties; the entries of the
    first batch, their dtypes and numbers of axes; the definition of the estimator, the likelihood, the requested
    parameters. What a module's own code asks for in another way (a plain attribute, a global) is not noticed. An
    estimator's settings, such as its seed, are free.

    A module of which the first examples show nothing (no gradient but zeros arrives, as at ``A`` of a LoRA with
    ``B = 0``) is looked at when a gradient arrives, and autograd is then asked once more. What a later batch
    contradicts (rows that follow the data) is found out in each pass again. Bases of :class:`fishkern.DirectionEnergy`
    are functions of the weights, and are computed in each pass.

    Under an initialised process group every rank prepares its own pass; of a model that FSDP2 shards all do together,
    by the first examples of the first rank's batch. Cost: that of :func:`fishkern.estimate` before
    its first batch, and for a moment its accumulators.

    Args:
        model: As for :func:`fishkern.estimate`.
        batch: One batch as ``estimate`` takes it, best the first one of the data, of two examples at least.
        estimator: The recipe; ``None`` for :class:`fishkern.DiagonalFisher`.
        likelihood: As for :func:`fishkern.estimate`.
        parameters: As for :func:`fishkern.estimate`.
        accumulate_on: As for :func:`fishkern.estimate`.
        check: As for :func:`fishkern.estimate`, and for all passes.
        backend: As for :func:`fishkern.estimate`.
        shared: As for :func:`fishkern.estimate`.

    Returns:
        The prepared pass.

    Raises:
        TypeError: The batch is neither a mapping nor a pair, or an argument is of another type than described.
        ValueError: There are no such parameters or no labels; the loss is not finite or is not the model's own; the
            examples interact; or an entry of the batch cannot be assigned to examples.
        UnsupportedModuleError: The gradients of a module cannot be exact, and the message says how to avoid it; or
            tensor parallel splits the model.
        RuntimeError: It runs under ``torch.inference_mode()``; or another rank has failed.
    """
    model = hosts.unwrap(model)
    options = Options(estimator, likelihood, parameters, accumulate_on, check, backend, shared)
    ranks = Ranks()
    with ranks.failing_together():
        sharding = sharding_of(model, ranks)
        if hosts.mesh_of(model) is not None:
            raise UnsupportedModuleError(
                "prepare is not built for tensor parallel models: call estimate without prepared=, which then does "
                "before its first batch what prepare would do."
            )
        request = request_of(model, options, in_parts=sharding is not None)
        if sharding is not None:
            check_sharded(request.estimator)
        reader = reader_for(model, likelihood, shared)
        examples = _read(batch, reader).to(request.device)
        answering = Answering(model, likelihood)
        known, paths = [], {}
        for names in request.groups:
            known.append(Known(examples))
            paths |= _prepare_pass(request, options, names, answering, known[-1], examples, sharding)
    note_own_tokens(reader.withheld)
    return Prepared(request, options, answering, known, paths, reader.withheld)


def _prepare_pass(
    request: Request,
    options: Options,
    names: list[str],
    answering: Answering,
    known: Known,
    examples: Examples,
    sharding: Sharding | None,
) -> Mapping[str, tuple[str, str]]:
    """Prepare the pass of some parameters, with states that are dropped afterwards."""
    backend = backends.current() if options.backend is None else options.backend
    infos = {name: request.infos[name] for name in names}
    part: dict[str, Tensor] = {name: request.tensors[name] for name in names}
    division = Division(Ranks(), sharding)
    states = division.states(infos, request.estimator, backend)
    one = division.one_pass(request.model, part, request.estimator, states, answering, options.check, known)
    try:
        return one.prepare(examples)
    finally:
        for name in states.names:
            states.pop(name)


def _read(batch: Any, reader: Reader) -> Examples:
    listed = isinstance(batch, list) and batch and all(isinstance(one, Mapping) for one in batch)
    several = listed and all(one.keys() == batch[0].keys() for one in batch)  # not inputs and targets
    if several or (isinstance(batch, Iterable) and not isinstance(batch, Mapping | tuple | list | Tensor)):
        raise TypeError(
            f"prepare takes one batch, got a {type(batch).__name__}: pass its first one, next(iter(batches))."
        )
    return reader(batch, 0)


def _facts_of_request(request: Request, options: Options) -> Facts:
    estimator = request.estimator
    facts: Facts = {("the argument", "estimator"): f"{type(estimator).__name__} {estimator.definition}"}
    likelihood = options.likelihood
    facts["the argument", "likelihood"] = Labelled(likelihood, "None" if likelihood is None else described(likelihood))
    facts["the argument", "shared"] = options.shared
    facts |= {("the estimate of", name): "left out" for name in scored_tensors(request.model)}
    for number, names in enumerate(request.groups, 1):
        which = f", in pass {number} of {len(request.groups)}" if len(request.groups) > 1 else ""
        facts |= {("the estimate of", name): f"asked for{which}" for name in names}
    return facts
