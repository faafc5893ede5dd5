"""``OnlineFisher``: the Fisher of a model while it trains, from the passes that train it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any, Literal, Self

import torch
from torch import nn

from fishkern import backend as backends
from fishkern import hosts
from fishkern.arguments import integer
from fishkern.backend import Backend
from fishkern.layers import Plan, UnsupportedModuleError
from fishkern.layers.reentrant import segment
from fishkern.layers.training import TrainingCapture, in_backward
from fishkern.names import listed
from fishkern.statistics.batches import Reader, Shared
from fishkern.statistics.choosing import Requested
from fishkern.statistics.coverage import slowest_paths
from fishkern.statistics.diagonal_fisher import DiagonalFisher
from fishkern.statistics.gradient_check import GradientCheck
from fishkern.statistics.model_call import ModelCall, read_batch, read_call
from fishkern.statistics.pairs import pair_reader
from fishkern.statistics.request import Options, coverage_of, request_of
from fishkern.statistics.result import Statistics
from fishkern.statistics.running_mean import RunningMean
from fishkern.statistics.states import States
from fishkern.statistics.training_plan import (
    batch_norms,
    links_to,
    plan_in_training,
    refuse_coupled,
    refuse_replaced,
)
from fishkern.warning import warn_caller

_DROPPED = ("num_items_in_batch",)  # the Trainer's divisor of the loss, of no example
_PATIENCE = 10  # how many plans may be unsettled; that of a LoRA is settled at the second step


class OnlineFisher:
    r"""A context around ordinary training steps that gives the running mean of exact per-example squares.

    A step's loss is a sum over its ``N`` examples of what each adds to it, its share. The gradient of an example is
    that of its share, times ``N``, so that the mean over examples is the gradient of the step:

        g_n[p] = d (N share_n) / d theta[p],     F_step[p] = 1/N sum_n g_n[p]^2
        F[p] <- decay F[p] + (1 - decay) F_step[p],     divided by 1 - decay^t after t steps

    The loss is the user's own, and so are the shares: where a loss is the mean over all tokens of a batch, the share of
    an example is the sum over its own tokens divided by the number of all. That is *not* the loss of the example alone,
    which :func:`fishkern.estimate` takes, unless all rows have equally many tokens. For a loss that is no sum of
    shares, such as a contrastive one, ``share_n`` is what passes through the rows of example ``n``.

    Nothing runs a second time: dropout is on, ``.grad`` is formed by autograd as ever, to the same bits on a CPU, and
    compiled code runs eagerly while the context is open. A step is a call of the model in training mode with gradients
    on, and one backward pass through it. Calls in evaluation mode are not steps. ``N`` is the length of ``input_ids``,
    ``labels``, or else the first argument that has an example axis.

    Before the first step, two of its examples run once more to plan the capture, and are left without a trace. What has
    neither a layer rule nor a module around it that keeps the examples apart is refused by name.

    Memory: two accumulators of each parameter's size, float32 (float64 for float64 parameters). Cost: one product more
    for each weight, of the size of its gradient's.

    Args:
        model: The model that trains; wrappers (DDP, ``torch.compile``) are removed. On several ranks each has the
            statistics of its own batches.
        decay: Weight of the past, at least 0 and below 1.
        parameters: As for :func:`fishkern.estimate`: by default every parameter with ``requires_grad``.
        batch: A batch as the loader yields it: a mapping or ``(inputs, labels)``. The capture is then planned when the
            context is entered, not at the first step.
        accumulation_steps: How many backward passes make up a step, whose examples are those of all of them. See
            :meth:`step` for steps of fewer.
        scaler: A ``torch.amp.GradScaler`` by whose scale the loss is multiplied. A step with infinite or NaN gradients,
            which the scaler skips, is then left out, and without a scaler raises.
        shared: Arguments of the model that all examples share, as for :func:`fishkern.estimate`.
        pairs: Where an example is a pair of answers, how its rows lie in a batch: ``"halves"``, first all chosen and
            then all rejected ones, or ``"interleaved"``. ``None``: each row is an example.
        check: Whether to compare, in the first step, the sum of the examples' gradients with ``.grad``.
        backend: ``None`` for the current default, see :mod:`fishkern.backend`.

    Raises:
        TypeError: ``model`` is not a module, or ``accumulation_steps`` no integer.
        ValueError: ``decay``, ``accumulation_steps`` or ``pairs`` is out of range, or there are no parameters.
        UnsupportedModuleError: The model is sharded, scripted, dispatched or replicated in threads.
        RuntimeError: It runs under ``torch.inference_mode()``.

    Inside the context, a call or a backward pass raises where a gradient could not be assigned to one example: see
    :class:`fishkern.UnsupportedModuleError`. A module or parameter that was replaced is a ``ValueError``; two forward
    or backward passes in one, or a second context on the model, are a ``RuntimeError``.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.95,
        *,
        parameters: Requested = None,
        batch: Any = None,
        accumulation_steps: int = 1,
        scaler: Any = None,
        shared: Shared = None,
        pairs: Literal["halves", "interleaved"] | None = None,
        check: bool = True,
        backend: Backend | None = None,
    ) -> None:
        if any(base.__name__ == "DataParallel" for base in type(model).__mro__):
            raise UnsupportedModuleError(
                "DataParallel runs copies of the model in threads, whose gradients cannot be told apart: use "
                "DistributedDataParallel, or one device."
            )
        self._model = hosts.unwrap(model)
        if reason := hosts.lost_prefix(self._model, training=True):
            raise UnsupportedModuleError(f"{reason}.")
        options = Options(DiagonalFisher(), None, parameters, None, check, backend, shared)
        self._request = request_of(self._model, options)
        self._requested = self._request.tensors
        self._device = next(iter(self._requested.values())).device
        backend = backends.current() if backend is None else backend
        states = States(self._request.infos, self._request.estimator, backend)
        if integer(accumulation_steps, "accumulation_steps") < 1:
            raise ValueError(f"accumulation_steps must be at least 1, got {accumulation_steps}.")
        self._mean = RunningMean(states, decay, skips=scaler is not None)
        self._accumulation_steps = integer(accumulation_steps, "accumulation_steps")
        self._batch = batch
        self._scaler = scaler
        self._scale = 1.0
        self._pairs = pairs
        self._reader = Reader(shared, dropped=_DROPPED, packed=None if pairs is None else pair_reader(pairs))
        self._calls = 0
        self._evaluating_calls = 0
        self._check = GradientCheck(self._requested) if check else None
        self._checked: bool | None = False if check else None
        self._unchecked = False  # whether the plan has not yet been checked by a step
        self._norms = batch_norms(self._model)
        self._links = links_to(self._model, self._requested.values())
        self._capture: TrainingCapture | None = None
        self._lone = False
        self._signature: object = None
        self._settled = True
        self._unsettled_plans = 0
        self._paths: dict[str, tuple[str, str]] = {}
        self._planning = False
        self._running = False
        self._opened: ExitStack | None = None

    def __enter__(self) -> Self:
        if self._opened is not None:
            raise RuntimeError("this OnlineFisher is open already.")
        if any(isinstance(getattr(hook, "__self__", None), OnlineFisher) for hook in _pre_hooks(self._model)):
            raise RuntimeError(
                "another OnlineFisher is open on this model, and their hooks would meet on its parameters: open one at "
                "a time."
            )
        with ExitStack() as stack:
            # hooks that are added after a compiled run never fire
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.callback(self._close_capture)
            before = self._model.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True)
            stack.callback(before.remove)
            after = self._model.register_forward_hook(self._after, with_kwargs=True, always_call=True)
            stack.callback(after.remove)
            if self._batch is not None:
                refuse_coupled(self._norms)
                self._plan(read_batch(self._model, self._batch, self._reader))
            self._opened = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        try:
            if kind is None:
                self._end_pass()
            else:
                self._mean.drop_step()  # nobody knows whether its gradients are still used
        finally:
            opened, self._opened = self._opened, None
            opened.close()

    @property
    def steps(self) -> int:
        """How many steps have been read."""
        self._end_pass()
        return self._mean.steps

    @property
    def statistics(self) -> Statistics:
        """The running mean as it stands, corrected for its start at zero; ``count`` is the number of examples read.

        Raises:
            ValueError: No step has been read.
        """
        self._end_pass()
        if not self._mean.steps:
            ignored = self._evaluating_calls
            raise ValueError(
                "no step has been read yet: the model must be called in training mode inside the context, and backward "
                "must follow."
                + (f" It was called {ignored} time(s) in evaluation mode: call model.train()." if ignored else "")
            )
        return Statistics(
            self._mean.corrected(),
            count=self._mean.examples,
            provenance={"definition": self._definition, "runs": [self._described]},
            coverage=coverage_of(self._request, self._paths),
        )

    def step(self) -> None:
        """End a step early, after fewer backward passes than ``accumulation_steps``, as at the end of an epoch.

        Where no backward pass has come since the last step, this does nothing.
        """
        self._end_pass()
        self._mean.end_step()

    def state_dict(self) -> dict[str, Any]:
        """Return what :meth:`load_state_dict` needs to go on as if nothing had happened.

        Returns:
            The means and counts, and the sums of a step that has begun. Tensors are not copied, as torch's optimizers
            do not copy theirs: save them before the next step.
        """
        self._end_pass()
        paths = {name: list(path) for name, path in self._paths.items()}
        own = {"accumulation_steps": self._accumulation_steps, "paths": paths, "checked": self._checked}
        own |= {} if self._pairs is None else {"pairs": True}
        return own | self._mean.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Args:
            state: From :meth:`state_dict` of an OnlineFisher of the same parameters and settings; copied.

        Raises:
            ValueError: It is of another decay, other accumulation steps, other examples or other parameters.
        """
        if state["accumulation_steps"] != self._accumulation_steps:
            raise ValueError(
                f"the state is of accumulation_steps={state['accumulation_steps']}, and this OnlineFisher has "
                f"{self._accumulation_steps}."
            )
        if state.get("pairs", False) != (self._pairs is not None):
            raise ValueError(
                "the state and this OnlineFisher do not count the same: one has pairs for examples and the other rows. "
                "Make it with pairs= as that of the state."
            )
        self._mean.load_state_dict(state)
        self._paths = slowest_paths([{name: tuple(path) for name, path in state["paths"].items()}])
        self._checked = state["checked"]

    @property
    def _definition(self) -> dict[str, Any]:
        return {
            "estimator": "OnlineFisher",
            "fisher_type": "empirical",
            "unit": "example",
            **({} if self._pairs is None else {"example": "pair"}),
            "gradient": "of an example's share of the step's loss, times the number of the step's examples",
            "mean": "running over steps, bias-corrected",
            "decay": self._mean.decay,
            **hosts.alterations(self._model),
        }

    @property
    def _described(self) -> dict[str, Any]:
        return {
            "model": type(self._model).__name__,
            "dtype": sorted({str(one.dtype).removeprefix("torch.") for one in self._requested.values()}),
            "examples": self._mean.examples,
            "steps": self._mean.steps,
            "skipped_steps": self._mean.skipped,
            "accumulation_steps": self._accumulation_steps,
            "checked": self._checked,
            "torch": torch.__version__,
        }

    def _before(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Begin a pass, if a call of the model is one of training."""
        # a call inside backward is that of a checkpoint around the whole model: its pass has begun
        if self._planning or in_backward() or not (torch.is_grad_enabled() or segment()):
            return
        self._end_pass()
        if self._capture is not None:
            self._capture.drop()
        if self._check is not None:
            self._check.end()  # also where no backward pass has come: a plan takes its hooks for the user's
        # A pass of estimate freezes the model or evaluates.
        if not model.training or not any(one.requires_grad for one in model.parameters()):
            self._evaluating_calls += not model.training
            return
        refuse_coupled(self._norms)
        refuse_replaced(self._links)
        call = read_call(model, args, kwargs, self._reader, self._calls)
        self._calls += 1
        if self._capture is None or not self._settled or (self._lone and call.num_examples > 1):
            self._plan(call)
        if self._scaler is not None:
            self._scale = self._scaler.get_scale()
        if self._unchecked:
            self._check.begin()
        self._capture.noted = self._check.note if self._unchecked else None
        self._capture.begin(call.num_examples, call.examples.order)
        self._running = True

    def _after(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if not self._running or self._planning or in_backward():
            return
        self._running = False
        if output is None:  # the forward pass raised
            self._capture.drop()
            return
        self._capture.forward_ended(output)

    def _plan(self, call: ModelCall) -> None:
        """Plan the capture by the examples of a call, and hook it."""
        self._planning = True
        try:
            plan = plan_in_training(self._model, self._requested, call, self._device)
        finally:
            self._planning = False
        self._settled = all(site.settled for site in plan.sites)
        self._lone = call.num_examples == 1
        self._unsettled_plans += not self._settled
        if not self._settled and self._unsettled_plans == _PATIENCE:
            warn_caller(
                f"no gradient but zeros has reached {listed(sorted(plan.unsettled))} in {_PATIENCE} steps, and until "
                "one does, the capture is planned again before every step, which takes several runs of two examples: "
                "leave out by parameters= what gets none."
            )
        signature = _signature(plan)
        if self._capture is not None and signature == self._signature:
            return
        self._close_capture()
        self._signature = signature
        self._paths = slowest_paths([self._paths, plan.paths])
        self._unchecked = self._check is not None
        self._capture = TrainingCapture(plan, self._mean.states.add).__enter__()

    def _close_capture(self) -> None:
        if self._check is not None:
            self._check.end()
        if self._capture is not None:
            self._capture.__exit__()
            self._capture = None

    def _end_pass(self) -> None:
        """End the latest pass, if its backward pass has run, and with the last one its step."""
        capture = self._capture
        if capture is None or capture.current is None or not capture.current.begun:
            return
        if in_backward():
            raise RuntimeError("the statistics of a step are read after its backward pass, not inside it.")
        examples, completed = capture.current.num_examples, capture.current.completed
        if not completed:
            capture.drop()
            self._mean.interrupt()
            return
        try:
            capture.finish()
            if self._unchecked and self._check.judge():
                self._checked, self._unchecked = True, False
        except BaseException:
            self._mean.drop_step()
            raise
        finally:
            if self._check is not None:
                self._check.end()
        self._mean.end_pass(examples, self._scale)
        if self._mean.passes == self._accumulation_steps:
            self._mean.end_step()


def _pre_hooks(model: nn.Module) -> Iterator[Any]:
    return (hook for module in model.modules() for hook in module._forward_pre_hooks.values())


def _signature(plan: Plan) -> object:
    """Say in what two plans differ."""
    return [
        (
            *(site.path, site.layer, tuple(site.keys.items())),
            *(site.layout, site.order, site.picked, site.rewritten, site.settled),
        )
        for site in plan.sites
    ] + [(one.path, one.key) for one in plan.idle]
