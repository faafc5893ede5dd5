"""Reentrant activation checkpointing, which passes no gradient into a segment unless one of its inputs requires one.

In training the embedding before it requires a gradient, and so does the embedding's output. A pass that freezes the
embedding would cut off the segments after it, and their parameters would silently get zeros.
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
    """Find the reentrantly checkpointed segment in whose forward pass the caller is running.

    Returns:
        The frame of the outermost one, when segments are nested: those inside it see no gradient in any case.
    """
    # torch keeps no record of it: the function on the stack is the only sign
    frame, outermost = sys._getframe(1), None
    while frame is not None:
        if frame.f_code is CheckpointFunction.forward.__code__:
            outermost = frame
        frame = frame.f_back
    return outermost


def is_cut_off(frame: FrameType) -> bool:
    """Tell whether no input of a segment requires a gradient.

    Args:
        frame: From :func:`segment`.

    Returns:
        Whether none does.
    """
    return not any(isinstance(arg, Tensor) and arg.requires_grad for arg in frame.f_locals["args"])


def why_cut_off(path: str, module: nn.Module) -> str:
    """Say that no gradient reaches a segment.

    Args:
        path: Name of a module in it.
        module: The module.

    Returns:
        Sentences for an error message.
    """
    return (
        f"{path!r} ({type(module).__name__}) runs under reentrant activation checkpointing, and no input of its "
        "segment requires a gradient: autograd gives its parameters none, not even in training. Checkpoint with "
        "use_reentrant=False, let an input require one (transformers: model.enable_input_require_grads()), or leave "
        "these parameters out with parameters=."
    )


def stays(frame: FrameType) -> bool:
    """Tell whether a segment is still checkpointed when a module around it is run once more.

    Args:
        frame: From :func:`segment`.

    Returns:
        Whether it is. transformers' own layers are not (:meth:`fishkern.layers.base.Call.run`).
    """
    return getattr(frame.f_locals["run_function"], "__module__", None) != hosts.modes.__name__


class Connection:
    """Let gradients reach checkpointed segments: the outputs of modules with parameters require one, as in training.

    Args:
        model: The model, frozen.
        parameters: The requested parameters.
    """

    def __init__(self, model: nn.Module, parameters: Collection[nn.Parameter]) -> None:
        requested = set(parameters)
        self._modules = [module for module in model.modules() if own_parameters(module)]
        self._requested = {
            module: path
            for path, module in model.named_modules()
            if not requested.isdisjoint(own_parameters(module).values())
        }
        self._handles: list[Any] = []
        self._settled = False

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    @property
    def connected(self) -> bool:
        """Whether the outputs of modules with parameters require a gradient: a run has met segments."""
        return bool(self._handles)

    def connect(self) -> None:
        """Let them require one in every run from here on."""
        if not self._handles:
            self._handles += [module.register_forward_hook(_require) for module in self._modules]

    def answered(self, run: Callable[[], Answer]) -> Answer:
        """Call a function that runs the model; the first time, once more if segments turn out to be cut off.

        Args:
            run: Runs the model.

        Returns:
            The function's result.

        Raises:
            UnsupportedModuleError: No module before a segment can require a gradient.
        """
        if self._settled:
            return run()
        with self._watched() as (segments, cut_off):
            answer = run()
        if segments:  # even if none is cut off now: in later runs fewer tensors may require a gradient
            self.connect()
        if cut_off:
            del answer
            with self._watched() as (_, cut_off):
                answer = run()
        if cut_off:
            raise UnsupportedModuleError(why_cut_off(self._requested[cut_off[0]], cut_off[0]))
        self._settled = True
        return answer

    @contextmanager
    def _watched(self) -> Iterator[tuple[list[nn.Module], list[nn.Module]]]:
        """List the requested modules that run in segments, and those of them whose segments are cut off."""
        segments: list[nn.Module] = []
        cut_off: list[nn.Module] = []

        def look(module: nn.Module, args: tuple[Any, ...]) -> None:
            if not torch.is_grad_enabled() and (frame := segment()) is not None:
                segments.append(module)
                if is_cut_off(frame):
                    cut_off.append(module)

        handles = [module.register_forward_pre_hook(look) for module in self._requested]
        try:
            with warnings.catch_warnings():  # torch's own warning: here they are connected, or refused
                warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")
                yield segments, cut_off
        finally:
            for handle in handles:
                handle.remove()


def _require(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    floating = isinstance(output, Tensor) and output.is_floating_point()
    if floating and torch.is_grad_enabled() and not output.requires_grad:
        return output.detach().requires_grad_().clone()  # not a leaf, because the model may write into it
    return None
