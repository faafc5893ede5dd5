"""Run a model on tensors without values: count the bytes that are alive and the FLOPs, and use no memory.

torch's fake tensors have a shape, a dtype and a device, and no values. Autograd keeps and frees them as it does real
ones, so the bytes of those that are alive at any moment are the bytes that a real run has at that moment.

A batch keeps its integers (tokens, labels, masks), since models and losses look at them; what is made from integers
alone keeps its values as well, up to a size. Where code asks for a value that there is not, it gets the answer of a run
in which nothing is wrong: ``any`` is false, ``all`` and other conditions are true, nothing is marked, a number is zero.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from fishkern.steps import Step

_aten = torch.ops.aten
_LOG = logging.getLogger("torch._subclasses.fake_tensor")
# The largest number of entries of an integer tensor that keeps its values.
_MOST_VALUES = 2**20
_INDEXING = (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default)
_ANY = (_aten.any.default, _aten.any.dim, _aten.any.dims)
_NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException)


@dataclass
class Phase:
    """One part of a run.

    Attributes:
        start: Bytes that are alive when it begins, without those of the model.
        peak: The most bytes that are alive during it, without those of the model.
        flops: FLOPs of its matrix products, convolutions and attention.
    """

    start: int
    peak: int = 0
    flops: int = 0


class Valueless(TorchDispatchMode):
    """While it is entered, tensors have no values; their bytes and the FLOPs of their operations are counted.

    Attributes:
        live: Bytes that are alive, without those of the model and the batch.
        peak: The most bytes that were alive since the last phase began.
        flops: FLOPs of matrix products, convolutions and attention, as torch counts them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._fake.take = self.take  # tensors without values say whom an operation tells what it takes
        self._sizes: dict[int, weakref.ref | None] = {}
        self._said_any: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._asked: set[str] = set()
        self._logs = False
        self.live = self.peak = self.flops = 0

    @contextmanager
    def phase(self) -> Iterator[Phase]:
        """Note the peak and the FLOPs of what runs inside the ``with`` block."""
        phase, flops, outer = Phase(self.live), self.flops, self.peak
        self.peak = self.live
        try:
            yield phase
        finally:
            phase.peak, phase.flops = self.peak, self.flops - flops
            self.peak = max(self.peak, outer)

    @contextmanager
    def noting(self, asked: set[str]) -> Iterator[None]:
        """Note which operations ask for values that there are not.

        Args:
            asked: Their names are added to it while the ``with`` block runs.

        Yields:
            Nothing.
        """
        outer, self._asked = self._asked, asked
        try:
            yield
        finally:
            self._asked = outer

    def repeat(self, phase: Phase) -> None:
        """Count a phase that has run before once more, without running it.

        Args:
            phase: One that left as many bytes alive as it found.
        """
        self.peak = max(self.peak, self.live + phase.peak - phase.start)
        self.flops += phase.flops

    def take(self, step: Step) -> None:
        """Count an operation that is taken as one step.

        Args:
            step: What it takes; its result has been made.
        """
        self.peak = max(self.peak, self.live + step.scratch)
        self.flops += step.flops

    def __enter__(self) -> Valueless:
        _LOG.disabled, self._logs = True, _LOG.disabled  # torch logs what does not run, also where that is expected
        return super().__enter__()

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        _LOG.disabled = self._logs

    @contextmanager
    def model(self, model: nn.Module) -> Iterator[None]:
        """Put tensors without values in the place of a model's parameters and buffers, and these back in the end.

        Args:
            model: Any module, on any device (:func:`device_of`).

        Yields:
            Nothing.
        """
        registers = [one for module in model.modules() for one in (module._parameters, module._buffers)]
        originals = [dict(register) for register in registers]
        tensors = {tensor for register in registers for tensor in register.values() if tensor is not None}
        likes = {tensor: self._of(tensor) for tensor in tensors}
        # a module may keep what it computes, and recurrent ones list their weights a second time
        attributes = {module: dict(vars(module)) for module in model.modules()}
        try:
            for register in registers:
                register.update({name: likes[tensor] for name, tensor in register.items() if tensor is not None})
            for module in attributes:
                if isinstance(module, nn.RNNBase):
                    module._flat_weights = [likes.get(weight, weight) for weight in module._flat_weights]
            yield
        finally:
            for register, original in zip(registers, originals, strict=True):
                register.clear()
                register.update(original)
            for module, values in attributes.items():
                vars(module).clear()
                vars(module).update(values)

    def input_like(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Make what stands for a tensor of a batch.

        Args:
            tensor: On any device.
            device: Where it is needed.

        Returns:
            A copy of integers of not too many entries, or ones if they have no values; else a tensor without values.
            Its bytes are not counted.
        """
        if not _keeps_values(tensor):
            return self._uncounted(self._like(tensor, device))
        if tensor.is_meta or isinstance(tensor, FakeTensor):
            return self._uncounted(torch.ones(tensor.shape, dtype=tensor.dtype, device=device))
        return self._uncounted(tensor.detach().to(device, copy=True))

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:  # half of all calls
            return args[0].fake_device
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(isinstance(tensor, FakeTensor) for tensor in tensors):
            out = self._without_values(func, args, kwargs)
        else:
            out = self._with_values(func, tensors, args, kwargs)
        packet = getattr(func, "overloadpacket", func)
        if (count := _flop_counts().get(packet)) is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        if (workspace := _WORKSPACES.get(packet)) is not None:
            self.peak = max(self.peak, self.live + workspace(*args))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return out

    def _with_values(self, func: Callable, tensors: list[Tensor], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run an operation on tensors that all have values, for real if its results keep theirs."""
        if not all(map(_keeps_values, tensors)):
            return self._without_values(func, args, kwargs)
        try:
            with self._fake:
                out = func(*args, **kwargs)
        except _NEEDS_VALUES:
            return func(*args, **kwargs)
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        return func(*args, **kwargs) if all(map(_keeps_values, results)) else out

    def _without_values(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        answer = _ANSWERS.get(func)
        if answer is not None:
            self._asked.add(str(func).removeprefix("aten.").partition(".")[0])
            return answer(self, *args)
        if (written := _written(func, args, kwargs)) is not None:
            return written
        if func in _INDEXING:
            args = (args[0], _by_numbers(args[1]), *args[2:])
        with self._fake:
            out = func(*args, **kwargs)
        if func in _ANY:
            self._said_any[out] = True
        return out

    def _number(self, tensor: Tensor) -> bool | int | float:
        if tensor.dtype == torch.bool:
            return tensor not in self._said_any
        return 0.0 if tensor.is_floating_point() else 0

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._sizes:
            return

        def freed(_: object) -> None:
            del self._sizes[key]
            self.live -= size

        self._sizes[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _of(self, tensor: Tensor) -> Tensor:
        """Make what stands for a tensor of the model, whose bytes are not counted."""
        like = self._like(tensor, device_of(tensor))
        if isinstance(tensor, nn.Parameter):
            like = nn.Parameter(like, requires_grad=tensor.requires_grad)
        elif _keeps_values(tensor):  # positions, say
            like = self.input_like(tensor, device_of(tensor))
        if tensor._backward_hooks:
            like.register_hook(lambda grad: None)  # says that there are some
        return self._uncounted(like)

    def _uncounted(self, tensor: Tensor) -> Tensor:
        """Leave out the bytes of a tensor that is there before and after the run."""
        self._sizes[tensor.untyped_storage()._cdata] = None
        return tensor

    def _like(self, tensor: Tensor, device: torch.device) -> Tensor:
        with self._fake:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)


def device_of(tensor: Tensor) -> torch.device:
    """Say which device a tensor is taken to be on.

    Args:
        tensor: A parameter or buffer.

    Returns:
        Its own; for the meta device the CPU.
    """
    return torch.device("cpu") if tensor.is_meta else tensor.device


def _written(func: Any, args: tuple, kwargs: Mapping[str, Any]) -> Tensor | None:
    """Find the tensor that an operation in place writes into and returns; without values there is nothing to do."""
    if not func._schema.is_mutable or len(func._schema.returns) != 1 or torch.Tag.inplace_view in func.tags:
        return None
    target = kwargs["out"] if "out" in kwargs else args[0] if func._schema.name.endswith("_") else None
    # an empty result is given its size by the operation
    return target if isinstance(target, FakeTensor) and target.numel() else None


def _by_numbers(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Replace masks that have values by the numbers of what they mark, whose count is the shape of the result."""
    numbers: list[Tensor | None] = []
    for index in indices:
        masks = isinstance(index, Tensor) and index.dtype == torch.bool and not isinstance(index, FakeTensor)
        numbers += index.nonzero().unbind(1) if masks else [index]
    return numbers


def _keeps_values(tensor: Tensor) -> bool:
    whole = not (tensor.is_floating_point() or tensor.is_complex())
    return whole and tensor.numel() <= _MOST_VALUES


def _none_marked(mode: Valueless, tensor: Tensor) -> Tensor:
    return torch.empty(0, tensor.ndim, dtype=torch.int64)


_ANSWERS: dict[Any, Callable[..., Any]] = {
    _aten._local_scalar_dense.default: Valueless._number,
    _aten.equal.default: lambda mode, *tensors: True,
    _aten.allclose.default: lambda mode, *tensors: True,
    _aten.nonzero.default: _none_marked,
}


@cache
def _flop_counts() -> dict[Any, Callable[..., int]]:
    """Return torch's formulas, and those of what it counts under another name."""
    # not at the top: it imports triton
    from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

    def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
        return sdpa_flop_count(query.shape, key.shape, value.shape)

    def attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
        return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)

    return {
        **flop_registry,
        _aten.addmm_: flop_registry[_aten.addmm],
        _aten.baddbmm_: flop_registry[_aten.baddbmm],
        _aten._scaled_dot_product_flash_attention_for_cpu: attention,
        _aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }


def _eigh_workspace(matrix: Tensor, *args: Any) -> int:
    """LAPACK's syevd takes ``1 + 6 n + 2 n^2`` numbers besides the matrix."""
    n = matrix.shape[-1]
    return (1 + 6 * n + 2 * n * n) * matrix.element_size()


_WORKSPACES: dict[Any, Callable[..., int]] = {_aten._linalg_eigh: _eigh_workspace}
