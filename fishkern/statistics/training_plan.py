"""Plan the capture of a model in training: the survey runs as training does, dropout included, on two examples.

No loss of an example is known, only that of the user's batch. So sums of what the model returns for each example stand
in for losses (:func:`fishkern.layers.training.stand_in_losses`): a survey asks on which rows a loss depends, and any
loss of the outputs depends on the same.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fishkern import hosts
from fishkern.layers import (
    Connection,
    Plan,
    Site,
    UnsupportedModuleError,
    as_found,
    gradient_kept,
    hooked_parameters,
    leave_out,
    survey,
)
from fishkern.layers.reentrant import segment
from fishkern.layers.tap import copied, frozen_call
from fishkern.layers.training import drawn_since, draws, no_rows_in_output, random_states, stand_in_losses
from fishkern.statistics.model_call import ModelCall

# A module that runs once more for its gradients must return what it returned, up to so many units of rounding.
_SAME_OUTPUT = 64

Link = tuple[str, Mapping[str, Any], str, Any]


def plan_in_training(model: nn.Module, requested: Mapping[str, Tensor], call: ModelCall, device: torch.device) -> Plan:
    """Decide which path computes each parameter while the model trains.

    Args:
        model: In the modes in which it trains; left as found, with torch's generators.
        requested: Parameters by canonical name.
        call: A call of the model.
        device: That of the model.

    Returns:
        A plan without parameters in the loop.

    Raises:
        UnsupportedModuleError: A parameter has only the loop, or the model's output tells no examples apart.
    """
    if segment():
        raise UnsupportedModuleError(
            "the model is called inside a reentrant checkpoint, where nothing can be found out about it: pass a batch "
            "as batch=, by which the capture is planned before, or checkpoint with use_reentrant=False."
        )
    keys = {one: key for key, one in requested.items()}
    if hooked := hooked_parameters(keys):
        raise UnsupportedModuleError(_needs_loop(hooked))
    call = call.few(device)
    with _running(model, requested.values(), device) as (again, connection):

        def losses() -> Tensor:
            again()
            values = stand_in_losses(call.run(model), call.num_examples, call.examples.order)
            if values is None:
                raise UnsupportedModuleError(no_rows_in_output(call.examples.num_rows))
            return values

        def output() -> None:
            again()
            call.run(model)

        options = {"num_examples": call.num_examples, "order": call.examples.order}
        plan, _ = survey(model, keys, losses, answered=connection.answered, **options)
        if plan.loop:
            reasons = plan.loop
            with _noting_draws(model, device) as drawing:
                output()
            raise UnsupportedModuleError(_needs_loop(_with_draws(reasons, drawing)))
        with _comparing_reruns([site for site in plan.sites if site.layer is not None and site.reruns]):
            output()
    return plan


def refuse_coupled(norms: Collection[tuple[str, nn.Module]]) -> None:
    """Refuse norms that normalise each example by the others of its batch, which they do in training mode.

    Args:
        norms: The batch norms of a model, with their names.

    Raises:
        UnsupportedModuleError: One is in training mode.
    """
    for path, module in norms:
        if module.training:
            raise UnsupportedModuleError(
                f"{path!r} ({type(module).__name__}) is in training mode and normalises each example by the others of "
                "its batch, so that no example has a gradient of its own: switch it to evaluation mode after "
                "model.train(), or use a norm of single examples, such as GroupNorm."
            )


def links_to(model: nn.Module, parameters: Iterable[Tensor]) -> list[Link]:
    """Note where a model holds some parameters, and the modules on the way to them.

    Args:
        model: Any module.
        parameters: The parameters.

    Returns:
        Name, the register of the module that holds it, the name in that register, and what it holds there.
    """
    wanted = set(parameters)
    links: dict[str, Link] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter not in wanted:
            continue
        *path, last = name.split(".")
        module = model
        for number, part in enumerate(path, 1):
            within = ".".join(path[:number])
            links[within] = (within, module._modules, part, module._modules[part])
            module = module._modules[part]
        links[name] = (name, module._parameters, last, parameter)
    return list(links.values())


def refuse_replaced(links: Iterable[Link]) -> None:
    """Refuse a model in which a module or parameter was replaced, whose gradients no hook would see.

    Args:
        links: From :func:`links_to`, before.

    Raises:
        ValueError: Something was.
    """
    for name, register, own, held in links:
        if register.get(own) is not held:
            raise ValueError(
                f"{name!r} was replaced or removed since this OnlineFisher was made, which sees the model as it was: "
                "make a new one of the model as it is."
            )


def batch_norms(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """List the batch norms of a model.

    Args:
        model: Any module.

    Returns:
        Names and modules.
    """
    return [one for one in model.named_modules() if isinstance(one[1], nn.modules.batchnorm._BatchNorm)]


@contextmanager
def _running(
    model: nn.Module, parameters: Collection[nn.Parameter], device: torch.device
) -> Iterator[tuple[Any, Connection]]:
    """Freeze a model in its modes; yields what makes every run the same one, random draws included."""
    begun = random_states(device)
    with ExitStack() as stack:
        stack.enter_context(hosts.connected_inputs(model))
        stack.enter_context(gradient_kept(model))
        stack.enter_context(torch.enable_grad())
        # a checkpoint around the whole model must not take what is saved here for its own
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor))
        restore = stack.enter_context(as_found(model))
        stack.callback(_set_random, begun, device)

        def again() -> None:
            restore()
            _set_random(begun, device)

        yield again, stack.enter_context(Connection(model, parameters))


def _set_random(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state, device)


@contextmanager
def _noting_draws(model: nn.Module, device: torch.device) -> Iterator[dict[str, nn.Module]]:
    """List the modules that draw random numbers, and those around them."""
    drawing: dict[str, nn.Module] = {}
    before: dict[nn.Module, list[Tensor]] = {}

    def enter(module: nn.Module, args: Any) -> None:
        before[module] = random_states(device)

    def leaving(path: str) -> Any:
        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if drawn_since(before[module], device):
                drawing[path] = module

        return leave

    handles = []
    for path, module in model.named_modules():
        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leaving(path))]
    try:
        yield drawing
    finally:
        for handle in handles:
            handle.remove()


def _with_draws(reasons: Mapping[str, str], drawing: Mapping[str, nn.Module]) -> dict[str, str]:
    """Add to each reason the smallest module around the parameter's own that draws random numbers, if there is one."""
    said = {}
    for key, reason in reasons.items():
        around = [path for path in drawing if path and key.startswith(f"{path}.")]
        path = max(around, key=len, default=None)
        said[key] = reason if path is None else f"{reason}; {draws(path, drawing[path])}"
    return said


def _needs_loop(reasons: Mapping[str, str], most: int = 8) -> str:
    shown = "; ".join(f"{key}: {reason}" for key, reason in list(reasons.items())[:most])
    more = f" and {len(reasons) - most} more" if len(reasons) > most else ""
    return (
        f"only one pass over the whole model for each example gives the gradients of {len(reasons)} parameter(s), and "
        f"a training step has no such passes: {shown}{more}. {leave_out(reasons, by_autograd=False)}"
    )


@contextmanager
def _comparing_reruns(sites: list[Site]) -> Iterator[None]:
    """Check that modules which run once more for their gradients compute in evaluation mode what they do in training.

    Raises:
        UnsupportedModuleError: One does not.
    """
    entered: dict[nn.Module, Any] = {}

    def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        entered[module] = copied((args, kwargs))

    def comparing(site: Site) -> Any:
        def compare(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            call = frozen_call(module, *entered[module])
            again = call.thaw(call.tensors).run()
            if not _alike(again, output):
                raise UnsupportedModuleError(
                    f"{site.path!r} ({type(module).__name__}) computes another output in training mode than in "
                    "evaluation mode, in which it would run once more for its gradients. Switch it to evaluation mode "
                    f"after model.train(). {leave_out(site.keys.values(), by_autograd=False)}"
                )

        return compare

    handles = []
    for site in sites:
        module = site.module
        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True))
        handles.append(module.register_forward_hook(comparing(site), with_kwargs=True, prepend=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _alike(one: Any, other: Any) -> bool:
    ours, theirs = ([leaf for leaf in tree_leaves(each) if isinstance(leaf, Tensor)] for each in (one, other))
    return len(ours) == len(theirs) and all(map(_same, ours, theirs))


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or not one.is_floating_point():
        return one.shape == other.shape
    allowed = _SAME_OUTPUT * torch.finfo(one.dtype).eps * other.abs().max() if one.numel() else 0
    return bool((((one - other).abs() <= allowed) | (one == other)).all())
