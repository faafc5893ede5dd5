"""Modules that several processes compute together (tensor parallel), each with a part of the weights.

torch's ``parallelize_module`` makes weights ``DTensor`` and puts hooks on the module that turn its input into one and
its output back. transformers' plans (``tp_plan``) replace the module's ``forward``, inside which the same happens. So a
hook of ours, next to the forward of the class, sees distributed tensors in the one case and this process's in the
other, of which the plan says how they are distributed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

_OF_TRANSFORMERS = "transformers.distributed."
# Styles of transformers' plans, of which the ones below add nothing to a module that a gradient could show.
_SPLITTING = ("ColwiseParallel", "RowwiseParallel", "EmbeddingParallel")
_HARMLESS = ("TensorParallelLayer", "AllReduceParallel")
_EXPERTS = "MoeExpertsParallel"
_SUMMED = "ReplicatedWithGradAllReduce"
_HEADS = ("lm_head", "classifier", "score", "head")
_WHOLE = "load the whole model in each process"


@dataclass(frozen=True, eq=False)
class Split:
    """How several processes compute one module.

    Args:
        mesh: The processes, a ``DeviceMesh`` of one axis.
        takes: Placement of an input that is no ``DTensor``; ``None`` for one that every process has whole.
        gives: Placement of an output that is no ``DTensor``, likewise.
        summed: Whether each process has inputs of its own, such as its heads, so that the gradient of a parameter that
            all of them hold is the sum over processes.
    """

    mesh: Any
    takes: Any = None
    gives: Any = None
    summed: bool = False


def split_of(module: nn.Module) -> Split | None:
    """Say how several processes compute a module together.

    Args:
        module: Any module.

    Returns:
        How, or ``None`` where this process computes it alone.
    """
    if vars(module).get("_distribute_module_applied"):  # by torch's distribute_module, in every style of its own
        parameter = next((one for one in module._parameters.values() if is_distributed(one)), None)
        return None if parameter is None else Split(_of_models(parameter.device_mesh))
    kind, style, mesh = _style_of(module)
    if kind == _SUMMED:
        return Split(mesh, summed=True)
    if kind not in (*_SPLITTING, _EXPERTS):
        return None
    return (
        Split(mesh)
        if kind in ("EmbeddingParallel", _EXPERTS)
        else Split(mesh, style.input_layouts, style.output_layouts)
    )


def is_distributed(tensor: Any) -> bool:
    """Tell whether processes hold parts of a tensor.

    Args:
        tensor: Anything.

    Returns:
        Whether it is a ``DTensor``.
    """
    return hasattr(tensor, "device_mesh")


def own_part(tensor: Tensor, like: Tensor) -> Tensor:
    """Give the part of a parameter's gradient that this process holds.

    Args:
        tensor: Of the parameter's shape.
        like: The parameter.

    Returns:
        The part of a ``DTensor`` that is this process's of the parameter, summed where each process has a summand; any
        other tensor itself.
    """
    if not is_distributed(tensor):
        return tensor
    placements = getattr(like, "placements", tensor.placements)
    part = (tensor if tensor.placements == placements else tensor.redistribute(placements=placements)).to_local()
    return part.wait() if hasattr(part, "wait") else part  # of a collective operation that may be under way


def completes_gradient(hook: Any) -> bool:
    """Tell whether a hook on a parameter sums its gradient over the processes that find summands of it.

    Args:
        hook: As for ``register_post_accumulate_grad_hook``.

    Returns:
        Whether it is that of ``replicated_with_grad_allreduce``, which transformers adds once, in the first forward
        pass.
    """
    return str(getattr(hook, "__module__", "")).startswith(_OF_TRANSFORMERS)


def in_any(flags: Tensor, split: Split | None) -> Tensor:
    """Tell what holds in any of the processes that compute a module, each of which sees a part of it.

    Args:
        flags: Bools.
        split: How they compute it; ``None`` for this process alone.

    Returns:
        The same where it holds in any. A collective operation.
    """
    if split is None:
        return flags
    flags = flags.to(torch.uint8)
    dist.all_reduce(flags, dist.ReduceOp.MAX, group=split.mesh.get_group())
    return flags.bool()


def placed_over(parameter: Any, mesh: Any) -> Any | None:
    """Say how a parameter is placed over the processes that compute its module.

    Where FSDP2 shards it as well, its mesh has the axes of the data before that of these processes, outside of forward
    and backward passes.

    Args:
        parameter: A parameter.
        mesh: The processes, of one axis.

    Returns:
        The placement; ``None`` where each of them has the whole parameter, or where FSDP2 alone shards it.
    """
    if not is_distributed(parameter):
        return None
    last = parameter.device_mesh.get_group(parameter.device_mesh.ndim - 1)
    alike = dist.get_process_group_ranks(last) == dist.get_process_group_ranks(mesh.get_group())
    return parameter.placements[-1] if alike else None


def split_range(parameter: Tensor, mesh: Any) -> tuple[int, range] | None:
    """Say which part of a parameter this process computes with, whether FSDP2 has gathered it or not.

    Args:
        parameter: A parameter.
        mesh: The processes that compute its module, of one axis.

    Returns:
        The axis along which they split it, and the indices of the part; ``None`` where each has all.
    """
    placement = placed_over(parameter, mesh)
    if placement is None or placement.is_replicate():
        return None
    size = parameter.shape[placement.dim]
    step = -(-size // mesh.size())  # as torch.chunk deals them: the last ones may have fewer, or none
    first = min(mesh.get_local_rank() * step, size)
    return placement.dim, range(first, min(first + step, size))


def computed_shape(parameter: Tensor, mesh: Any) -> torch.Size:
    """Give the shape of the part of a parameter that this process computes with.

    Args:
        parameter: A parameter.
        mesh: The processes that compute its module, of one axis; ``None`` for this one alone.

    Returns:
        The shape, which is that of the whole parameter where FSDP2 alone shards it.
    """
    shape = list(parameter.shape)
    if mesh is not None and (part := split_range(parameter, mesh)) is not None:
        shape[part[0]] = len(part[1])
    return torch.Size(shape)


def mesh_of(model: nn.Module) -> Any | None:
    """Find the processes that compute a model together.

    Args:
        model: A module.

    Returns:
        Their ``DeviceMesh``, or ``None`` if this process computes the model alone.
    """
    return next((split.mesh for module in model.modules() if (split := split_of(module)) is not None), None)


def why_not_split(model: nn.Module, sharded: Collection[Tensor] = (), *, trained: bool = False) -> str | None:
    """Say what of a model is split over processes in a way that is not served.

    Args:
        model: A module.
        sharded: Parameters that FSDP2 shards.
        trained: Whether parameters and their gradients alone are used, and not what the model returns.

    Returns:
        The reason and what to do, or ``None``.
    """
    if stage := getattr(model, "_pp_stage", None):
        return f"each process has some of its layers (pipeline parallel, {stage.pp_size} stages): {_WHOLE}"
    head = next((one for name in _HEADS if (one := getattr(model, name, None)) is not None), None)
    gives = None if trained or head is None else given_by(head)
    if gives is not None and gives[0].is_shard():
        return (
            f"the model returns logits in parts (its head gives {gives[0]}), and a loss needs all of them: let the "
            "head gather them, by ColwiseParallel(output_layouts=Replicate()) of torch or colwise_gather_output of a "
            "tp_plan"
        )
    meshes: dict[str, Any] = {}
    mesh = mesh_of(model)
    for path, module in model.named_modules():
        kind, _, _ = _style_of(module)
        if kind and kind not in (*_SPLITTING, *_HARMLESS, _SUMMED, _EXPERTS):
            by_expert = "expert_parallel" in vars(module)["forward"].__module__
            parallel = "expert parallel" if by_expert else "tensor parallel"
            return (
                f"the plan of {parallel} splits {path} by {kind}, which is not served (served are colwise, rowwise, "
                "embedding_rowwise, embedding_colwise, moe_tp_experts and replicated_with_grad_allreduce): "
                f"{_WHOLE}, or leave {path} out of the plan"
            )
        split = split_of(module)
        for name, parameter in module._parameters.items():
            if parameter is not None and is_distributed(parameter):
                name = f"{path}.{name}".removeprefix(".")
                if reason := _why_no_part(name, module, parameter, split, mesh, beside=parameter in sharded):
                    return f"{reason}. {_WHOLE.capitalize()}"
        if split is not None:
            meshes[path] = split.mesh
    if len({tuple(mesh.mesh.flatten().tolist()) for mesh in meshes.values()}) > 1:
        return f"its modules are split over several sets of processes ({', '.join(list(meshes)[:4])}, ...): {_WHOLE}"
    return None


def _why_no_part(
    name: str, module: nn.Module, parameter: Any, split: Split | None, mesh: Any, *, beside: bool
) -> str | None:
    """Say why the part of a parameter is not served; ``beside``: FSDP2 shards it as well, or alone."""
    placement = placed_over(parameter, mesh) if beside and mesh is not None else parameter.placements[-1]
    if beside and (mesh is None or placement is None):
        return None
    if not beside and parameter.device_mesh.ndim != 1:
        return (
            f"{name} is split over a mesh of {parameter.device_mesh.ndim} axes, and one axis is served beside those of "
            "fully_shard: let the others have examples of their own"
        )
    if split is None:
        return f"{name} is a DTensor of a module that neither parallelize_module nor a tp_plan has split"
    if _style_of(module)[0] == _EXPERTS and not beside:
        served = parameter.ndim == 3 and not placement.is_replicate()
        return None if served else f"{name} of experts is split as {placement}, and weights without biases are served"
    if hasattr(placement, "split_factor"):
        return f"{name} is split in interleaved pieces ({placement}), as by packed_colwise, which is not served"
    if placement.is_replicate():
        return None
    of_map = isinstance(module, nn.Linear | nn.Embedding) and placement.is_shard() and placement.dim in (0, 1)
    served = "linears and embeddings are served, split along one of their axes"
    return None if of_map else f"{name} of {type(module).__name__} is split as {placement}, and {served}"


def _of_models(mesh: Any) -> Any:
    """Give the axis of a mesh whose processes compute a module together: the last one, after those of FSDP2."""
    return mesh if mesh.ndim == 1 or mesh.mesh_dim_names is None else mesh[mesh.mesh_dim_names[-1]]


def given_by(module: nn.Module) -> tuple[Any, bool] | None:
    """Say how what leaves a module is placed, after the hooks that torch's styles put on it.

    Args:
        module: A module.

    Returns:
        The placement, and whether this process's part leaves it as an ordinary tensor; ``None`` where processes do not
        compute it together, or nothing is said of its output.
    """
    split = split_of(module)
    if split is None:
        return None
    if split.gives is not None:
        return split.gives, True
    for hook in module._forward_hooks.values():
        prepares = _seen_by(hook).get("output_fn") if hasattr(hook, "__code__") else None
        arguments = getattr(prepares, "args", ())
        layouts = next((one for one in arguments if isinstance(one, tuple) and hasattr(one[0], "is_shard")), None)
        if layouts is not None:
            return layouts[0], True in arguments
    return None


def _style_of(module: nn.Module) -> tuple[str, Any, Any]:
    """Read the style of transformers by which a module is split, and its processes, from the forward that it set."""
    forward = vars(module).get("forward")
    if not str(getattr(forward, "__module__", "")).startswith(_OF_TRANSFORMERS):
        return "", None, None
    seen = _seen_by(forward)
    if "_all_reduce_grad" in seen:
        return _SUMMED, None, _seen_by(seen["_all_reduce_grad"])["mesh"]
    style = seen.get("self")
    return type(style).__name__, style, seen.get("mesh")


def _seen_by(function: Any) -> Mapping[str, Any]:
    """List the variables around a function that it reads."""
    names, cells = function.__code__.co_freevars, function.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}
