"""Reentrant activation checkpointing, which passes no gradient to a segment none of whose inputs requires one.

In training the embedding in front requires a gradient, and so does what comes out of it. A pass that freezes it or does
not ask for it would cut off the segments behind, and their parameters would get zeros without a word.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from fishkern import hosts
from fishkern.layers.base import own_parameters
from fishkern.layers.unsupported import UnsupportedModuleError

Answer = TypeVar("Answer")


def segment() -> FrameType | None:
    """Find the reentrantly checkpointed segment in whose forward pass the caller runs.

    Returns:
        The frame of the outermost one, when segments are nested: those inside it see no gradient in any case.
    """
    frame, found = sys._getframe(1), None
    while frame is not None:
        if frame.f_code is CheckpointFunction.forward.__code__:
            found = frame
        frame = frame.f_back
    return found


def is_cut_off(found: FrameType) -> bool:
    """Tell whether no input of a segment requires a gradient.

    Args:
        found: From :func:`segment`.

    Returns:
        Whether none does.
    """
    return not any(isinstance(arg, Tensor) and arg.requires_grad for arg in found.f_locals["args"])


def stays(found: FrameType) -> bool:
    """Tell whether a segment is checkpointed also where a module around it runs once more.

    Args:
        found: From :func:`segment`.

    Returns:
        Whether it is: transformers' own layers are not (:meth:`fishkern.layers.base.Call.run`).
    """
    return getattr(found.f_locals["run_function"], "__module__", None) != hosts.modes.__name__


class Connection:
    """Lets the segments of a model be reached: what its own parameters bring requires a gradient, as in training.

    Args:
        model: The model, frozen.
        parameters: Those that are asked for.
    """

    def __init__(self, model: nn.Module, parameters: Collection[nn.Parameter]) -> None:
        asked = set(parameters)
        self._modules = [module for module in model.modules() if own_parameters(module)]
        self._asked = {
            module: path
            for path, module in model.named_modules()
            if not asked.isdisjoint(own_parameters(module).values())
        }
        self._handles: list[Any] = []
        self._settled = False

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def answered(self, run: Callable[[], Answer]) -> Answer:
        """Run the model, the first time looking whether segments are cut off, and once more if they are.

        Args:
            run: Runs the model.

        Returns:
            What it returns.

        Raises:
            UnsupportedModuleError: There is nothing in front that could require a gradient.
        """
        if self._settled:
            return run()
        with self._watched() as (segments, cut_off):
            answer = run()
        if segments:  # also for later runs, in which less may require a gradient
            self._handles += [module.register_forward_hook(_require) for module in self._modules]
        if cut_off:
            del answer
            with self._watched() as (_, cut_off):
                answer = run()
        if cut_off:
            module = cut_off[0]
            raise UnsupportedModuleError(
                f"{self._asked[module]!r} ({type(module).__name__}) runs under reentrant activation checkpointing, and "
                "no input of its segment requires a gradient: autograd gives its parameters none, in training neither. "
                "Checkpoint with use_reentrant=False, or leave these parameters out with parameters=."
            )
        self._settled = True
        return answer

    @contextmanager
    def _watched(self) -> Iterator[tuple[list[nn.Module], list[nn.Module]]]:
        """List the modules asked for that run in segments, and those in segments that are cut off."""
        segments: list[nn.Module] = []
        cut_off: list[nn.Module] = []

        def look(module: nn.Module, args: tuple[Any, ...]) -> None:
            if not torch.is_grad_enabled() and (found := segment()) is not None:
                segments.append(module)
                if is_cut_off(found):
                    cut_off.append(module)

        handles = [module.register_forward_pre_hook(look) for module in self._asked]
        try:
            with warnings.catch_warnings():  # torch's own word of it: they are connected, or refused
                warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")
                yield segments, cut_off
        finally:
            for handle in handles:
                handle.remove()


def _require(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    floating = isinstance(output, Tensor) and output.is_floating_point()
    if floating and torch.is_grad_enabled() and not output.requires_grad:
        return output.detach().requires_grad_().clone()  # no leaf: the model may write into it
    return None
