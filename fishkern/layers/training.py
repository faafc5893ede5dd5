"""Capture while a model trains: the passes are the user's own, the weights require gradients and get theirs as ever.

A pass is one forward pass of the model and the backward pass through it. What arrives at a call of a module carries the
mark of its pass, so that a gradient of any other pass is noticed.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fishkern.layers.capture import Capture
from fishkern.layers.grads import PerExampleGrads
from fishkern.layers.hooks import Arrival
from fishkern.layers.path_plan import Plan
from fishkern.layers.reentrant import is_cut_off, segment, why_cut_off
from fishkern.layers.row_order import ONE_EACH, RowOrder
from fishkern.layers.site import Site
from fishkern.layers.strays import Strays
from fishkern.layers.unsupported import UnsupportedModuleError, leave_out
from fishkern.layers.uses import Sink
from fishkern.ops.dtypes import accumulates_in

_ONE_AT_A_TIME = (
    "Gradients are read of one forward pass of the model and one backward pass through it at a time: call backward "
    "before the model is called again, put inputs whose losses belong together into one batch, and add several losses "
    "up before backward."
)


class TrainingPass:
    """One forward pass of a model in training, and the backward pass through it.

    Args:
        num_examples: ``N`` of the batch.

    Attributes:
        begun: Whether a gradient has arrived.
        completed: Whether the backward pass has come to its end, and was not interrupted by an exception.
    """

    def __init__(self, num_examples: int) -> None:
        self.num_examples = num_examples
        self.begun = self.completed = False

    def begin(self) -> None:
        """Note that a gradient has arrived, and have autograd say when the backward pass is over."""
        if not self.begun:
            self.begun = True
            torch.autograd.Variable._execution_engine.queue_callback(self._complete)

    def _complete(self) -> None:
        self.completed = True


class TrainingCapture(Capture):
    """Hooks on the sites of a model that trains, for the time of a ``with`` block.

    Args:
        plan: A plan without parameters in the loop.
        sink: Called with a parameter's canonical name and its per-example gradients, during backward.
        noted: Called with the same for each single use of a parameter, before uses are added up; or ``None``.

    Attributes:
        current: The latest pass, until it is finished or dropped.
        noted: As given.
    """

    def __init__(self, plan: Plan, sink: Sink, noted: Callable[[str, PerExampleGrads], None] | None = None) -> None:
        self.current: TrainingPass | None = None
        self.noted = noted
        self._plan = plan
        self._order = ONE_EACH
        self._strays = Strays(plan.sites, plan.idle)
        self._watching = ExitStack()
        self._arrived: Counter[Site] = Counter()
        super().__init__(plan.sites, sink)

    def __enter__(self) -> TrainingCapture:
        super().__enter__()
        for site in self._sites:
            if site.reruns:
                self._handles += self._refusing_draws(site)
        return self

    def __exit__(self, *exception: object) -> None:
        self.drop()
        super().__exit__(*exception)

    def begin(self, num_examples: int, order: RowOrder = ONE_EACH) -> None:
        """Begin a pass: the model's forward pass follows.

        Args:
            num_examples: ``N`` of the batch.
            order: Which rows an example has, where it has several.
        """
        self._begin(num_examples, None)
        self._order = order
        self._arrived.clear()
        self.current = TrainingPass(num_examples)
        self._hooks.begin()
        self._watching.enter_context(self._strays.watched())

    def forward_ended(self, output: Any) -> None:
        """Note the end of the forward pass, and judge whose the rows are that modules picked from positions.

        Args:
            output: What the model returned.

        Raises:
            UnsupportedModuleError: A module was called as the plan does not foresee, or nothing in the output tells
                whose the rows are.
        """
        try:
            self._check_forward(output)
        except BaseException:
            self.drop()
            raise

    def _check_forward(self, output: Any) -> None:
        self._hooks.forward = False
        self._watching.close()
        if reasons := self._strays.reasons:
            raise UnsupportedModuleError(
                "this batch calls modules in another way than the first examples, so that only one pass for each "
                f"example would give their gradients: {reasons}. {leave_out(reasons)}"
            )
        begun = self.current
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.requires_grad and not leaf.is_leaf:
                leaf.register_hook(lambda grad: self._begun(begun))
        if self._rows.any_picked and torch.is_grad_enabled():
            self._judge(output)

    def drop(self) -> None:
        """Forget the latest pass: a gradient that still comes back through it is an error."""
        self.current = None
        self._hooks.end()
        self._watching.close()
        self._begin(0, None)

    def finish(self) -> None:
        """End the latest pass, whose backward pass is over.

        Raises:
            UnsupportedModuleError: A gradient arrived of which nothing says whose rows it has.
        """
        self._uses.finish()
        withheld, distrusted = sorted(self.withheld), sorted(self.distrusted)
        self.drop()
        if withheld:
            where = f" (in {', '.join(distrusted)})" if distrusted else ""
            raise UnsupportedModuleError(
                f"nothing says to which examples of this batch the gradients of these parameters belong{where}: "
                f"{withheld}. {leave_out(withheld)}"
            )

    def _note_call(self, site: Site, args: tuple, kwargs: Mapping[str, Any]) -> None:
        around = None if torch.is_grad_enabled() else segment()
        if around is not None and is_cut_off(around):
            raise UnsupportedModuleError(why_cut_off(site.path, site.module))
        super()._note_call(site, args, kwargs)

    def _mark(self) -> TrainingPass | None:
        return self.current if self._hooks.forward or in_backward() else None

    def _begun(self, one: TrainingPass | None) -> None:
        if self._weighing:
            return
        if one is None or one is not self.current:
            raise RuntimeError(f"a gradient came back through a forward pass that is not the latest. {_ONE_AT_A_TIME}")
        one.begin()

    def _receive(self, arrival: Arrival) -> None:
        if self._weighing:
            return
        site = arrival.site
        if arrival.mark is None:
            raise UnsupportedModuleError(
                f"{site.path or 'the model'} was called outside of a forward pass of the model, and a gradient came "
                "back through that call: such a call has no batch. Call it inside the model's forward, or leave its "
                f"parameters out. {leave_out(site.keys.values())}"
            )
        self._begun(arrival.mark)
        self._arrived[site] += 1
        if self._arrived[site] > self._uses.calls(site):
            raise RuntimeError(f"a second backward pass went through the same forward pass. {_ONE_AT_A_TIME}")
        super()._receive(arrival)

    def _deliver(self, key: str, grads: PerExampleGrads) -> None:
        if self.noted is not None:
            self.noted(key, grads)
        super()._deliver(key, grads)

    def _judge(self, output: Any) -> None:
        losses = stand_in_losses(output, self._num_examples, self._order)
        if losses is None:
            picked = sorted(key for site in self._sites if site.picked for key in site.keys.values())
            raise UnsupportedModuleError(
                f"{no_rows_in_output(self._order.count(self._num_examples))} {leave_out(picked)}"
            )
        self._weighing = True
        try:
            self._rows.judge(losses)
        finally:
            self._weighing = False

    def _refusing_draws(self, site: Site) -> list[Any]:
        """Watch a module that runs once more for its gradients: other random numbers would give other gradients."""
        before: dict[nn.Module, list[list[Tensor]]] = defaultdict(list)
        device = next((one.device for one in site.module.parameters()), torch.device("cpu"))

        def enter(module: nn.Module, args: Any) -> None:
            if self._hooks.forward:
                before[module].append(random_states(device))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if not self._hooks.forward:
                return
            states = before[module].pop()
            if output is not None and drawn_since(states, device):  # None: the call raised
                raise UnsupportedModuleError(f"{draws(site.path, site.module)}. {leave_out(site.keys.values())}")

        # the draws of the user's own hooks on it count as well: they run in the second run too
        module = site.module
        return [
            module.register_forward_pre_hook(enter, prepend=True),
            module.register_forward_hook(leave, always_call=True),
        ]


def in_backward() -> bool:
    """Tell whether the caller runs inside a backward pass, as activation checkpointing's recomputation does.

    Returns:
        Whether autograd is running on this thread.
    """
    return torch._C._current_graph_task_id() != -1


def stand_in_losses(output: Any, num_examples: int, order: RowOrder = ONE_EACH) -> Tensor | None:
    """Make a number of what each example has at a model's output, which depends on all of it.

    Whatever loss is computed of these outputs, its gradient comes back on the same ways.

    Args:
        output: What the model returned.
        num_examples: ``N``.
        order: Which rows an example has, where it has several.

    Returns:
        ``[N]``; ``None`` if no part of the output has the rows of the examples and requires a gradient.
    """
    total = None
    for leaf in tree_leaves(output):
        tensor = isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.requires_grad
        if tensor and leaf.ndim and leaf.shape[0] == order.count(num_examples) and leaf.numel():
            rows = order.by_example(leaf, num_examples).reshape(num_examples, -1).to(accumulates_in(leaf.dtype))
            # weights without a pattern, so that what sums up to a constant (a softmax, a normalised row) does not here
            part = (rows * torch.arange(rows.shape[1], device=rows.device).to(rows.dtype).cos()).sum(1)
            total = part if total is None else total + part
    return total


def no_rows_in_output(rows: int) -> str:
    """Say that nothing in a model's output tells the examples apart.

    Args:
        rows: How many rows the batch has.

    Returns:
        Sentences for an error message.
    """
    return (
        f"the model returned no tensor with one row for each of {rows} of its input, by which it is established "
        "whose rows pass through its modules: let it return its logits [N, ...] besides a loss."
    )


def draws(path: str, module: nn.Module) -> str:
    """Say that a module draws random numbers.

    Args:
        path: Its name.
        module: The module.

    Returns:
        A clause for an error message.
    """
    return (
        f"{path!r} ({type(module).__name__}) draws random numbers in training mode, and its gradients come from "
        "running it once more, which would draw others: set its dropout to 0"
    )


def random_states(device: torch.device) -> list[Tensor]:
    """Read the states of torch's generators.

    Args:
        device: That of the model.

    Returns:
        The state of the CPU's generator and, on a GPU, of the device's.
    """
    on_gpu = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *on_gpu]


def drawn_since(states: list[Tensor], device: torch.device) -> bool:
    """Tell whether random numbers were drawn since some states were read.

    Args:
        states: From :func:`random_states`.
        device: The same.

    Returns:
        Whether any state has changed.
    """
    return not all(torch.equal(one, other) for one, other in zip(states, random_states(device), strict=True))
