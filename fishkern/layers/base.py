"""Layer rules: from one call of one module to the per-example gradients of its parameters.

A rule gets the tensors of a call as the module saw them, rows first: ``activations [N, ..., I]``, ``output_grads
[N, ..., O]``. Axes between rows and features are positions; :func:`positions` flattens them to ``T``. Where the rows
are those of ``[N, T]`` flattened, the gradients are joined afterwards
(:meth:`fishkern.layers.grads.PerExampleGrads.unflattened`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fishkern.layers.grads import PerExampleGrads

_AROUND_FORWARD = ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Call:
    """One call of a module in a forward pass.

    Args:
        module: The module.
        args: Its positional arguments, detached: as its ``forward`` gets them, or, if a rule runs the module once more,
            as they are before the hooks on its input run.
        kwargs: Its keyword arguments, likewise.
        autocast: Device type, whether autocast was on, and its dtype, when the call was made.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    autocast: tuple[str, bool, torch.dtype]

    @property
    def input(self) -> Tensor:
        """The first argument, by position or by keyword."""
        return self.args[0] if self.args else next(iter(self.kwargs.values()))

    def run(
        self, parameters: Mapping[str, Tensor] | None = None, then: Callable[[Any], Any] = lambda output: output
    ) -> Any:
        """Call the module once more, under the autocast state of the first time and without checkpointing.

        Its own hooks on output and gradients do not run, because a tap sees the output before they do. Those on its
        input run, since some compute a weight there (pruning), and so do all hooks of modules inside.

        Args:
            parameters: Tensors that replace parameters, by their names in the module.
            then: Called with the module's output while the replacements are in place: a backward pass may recompute a
                segment of the module.

        Returns:
            The result of ``then``: by default, the module's output.
        """
        device_type, enabled, dtype = self.autocast
        # In a model in evaluation mode, only modules that checkpoint their activations are left in training mode.
        training = [module for module in self.module.modules() if module.training]
        state = vars(self.module)
        around = {name: state[name] for name in _AROUND_FORWARD if state[name]}
        try:
            state.update({name: OrderedDict() for name in around})
            for module in training:
                module.training = False
            with torch.autocast(device_type, dtype=dtype, enabled=enabled):
                values = _in_each_place(self.module, parameters or {})
                following = _Following(self.module, then)
                values = {f"module.{name}": value for name, value in values.items()}
                return torch.func.functional_call(following, values, self.args, dict(self.kwargs), tie_weights=False)
        finally:
            state.update(around)
            for module in training:
                module.training = True


class _Following(nn.Module):
    """A module, followed by a function of its output."""

    def __init__(self, module: nn.Module, then: Callable[[Any], Any]) -> None:
        super().__init__()
        self.module, self._then = module, then

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._then(self.module(*args, **kwargs))


def _in_each_place(module: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name every place once where a parameter is registered.

    torch's own way to do so (``tie_weights``) names a module that two others share twice, and then leaves the
    replacement there instead of the parameter.

    Args:
        module: The module.
        parameters: Replacements, by any name of the parameter.

    Returns:
        Replacements by the names of all places.
    """
    if not parameters:
        return {}
    named = dict(module.named_parameters(remove_duplicate=False))
    values = {named[name]: value for name, value in parameters.items()}
    return {
        f"{path}.{name}" if path else name: values[parameter]
        for path, one in module.named_modules()
        for name, parameter in one._parameters.items()
        if parameter is not None and parameter in values
    }


class Layer(ABC):
    """Per-example gradients of the parameters that one kind of module owns.

    Attributes:
        reruns: Whether the rule runs the module once more (:meth:`Call.run`).
        several: Whether the module returns several tensors. The rule then gets the gradient of each floating one,
            ``None`` where none arrived.
        sums_processes: Whether the gradients that it gives may be sums over processes, of the positions that each has.
    """

    reruns: ClassVar[bool] = False
    several: ClassVar[bool] = False
    sums_processes: ClassVar[bool] = False

    @abstractmethod
    def covers(self, module: nn.Module) -> frozenset[str]:
        """Say which parameters of a module this rule computes, judged by the module alone.

        Args:
            module: Any module.

        Returns:
            Names relative to the module; empty if the rule is for other modules. Those of modules inside, which are
            not called themselves, are then computed at this module's call.
        """

    def confirms(self, call: Call, output: Any, names: frozenset[str]) -> frozenset[str]:
        """Check on a real call that the module computes what the rule assumes.

        Args:
            call: A call on two examples.
            output: The module's output: a tensor, unless the rule says :attr:`several`.
            names: The requested ones of the names that :meth:`covers` gave.

        Returns:
            The names for which the rule holds.
        """
        return names

    def reads_input(self, names: frozenset[str]) -> bool:
        """Say whether the gradients need the input of the call, which is then kept until the backward pass.

        Args:
            names: The requested parameters.

        Returns:
            Whether to keep it.
        """
        return True

    def gives_factors(self, name: str) -> bool:
        """Say whether a parameter's gradients are outer products of activations and output gradients.

        Args:
            name: One of the names that :meth:`covers` gives.

        Returns:
            Whether they come as :class:`fishkern.layers.grads.OuterProductGrads`.
        """
        return False

    @abstractmethod
    def per_example_grads(
        self, call: Call, output_grads: Tensor | Sequence[Tensor | None], names: frozenset[str]
    ) -> Iterator[tuple[str, PerExampleGrads]]:
        """Compute the per-example gradients of one call.

        Args:
            call: The call, every tensor with its rows first.
            output_grads: Gradient of the **summed** loss by the output, ``[N, ..., O]``; a list of them for a rule that
                says :attr:`several`.
            names: The parameters, all of which the rule computes.

        Yields:
            Name and gradients.
        """


def runs(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Tell whether a module computes exactly what one of torch's classes does.

    Args:
        module: Any module.
        kind: The class.

    Returns:
        Whether it is an instance and its ``forward`` is that of the class: neither a subclass's own nor one that was
        set on the module itself (as accelerate's ``add_hook_to_module`` does).
    """
    return isinstance(module, kind) and type(module).forward is kind.forward and not is_patched(module)


def is_patched(module: nn.Module) -> bool:
    """Tell whether a ``forward`` was set on the module itself, past its class.

    Args:
        module: Any module.

    Returns:
        Whether it has.
    """
    return "forward" in vars(module)


def positions(tensor: Tensor, features: int = 1) -> Tensor:
    """Flatten the axes between the example axis and the features.

    Args:
        tensor: ``[N, ..., *features]``.
        features: How many trailing axes are features.

    Returns:
        ``[N, T, *features]``, ``T = 1`` if there are none.
    """
    if tensor.ndim == features + 2:
        return tensor
    between = tensor.shape[1 : tensor.ndim - features]
    return tensor.reshape(tensor.shape[0], between.numel(), *tensor.shape[tensor.ndim - features :])


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """List the parameters that a module holds itself or in parameter containers.

    Args:
        module: Any module.

    Returns:
        Parameters by their names in the module. A ``ParameterDict`` or ``ParameterList`` is never called, so its
        parameters belong to the module around it.
    """
    own = dict(module.named_parameters(recurse=False))
    for name, child in module.named_children():
        if isinstance(child, nn.ParameterDict | nn.ParameterList):
            own |= {f"{name}.{key}": parameter for key, parameter in child.named_parameters()}
    return own
