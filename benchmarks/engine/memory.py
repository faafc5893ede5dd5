"""Memory: what a process has resident, the peak during a call, and what the system can still give."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

MIB, GIB = 2**20, 2**30


def resident_mib(field: str) -> float:
    """A field of ``/proc/self/status``, such as ``VmRSS``."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def forget_peak() -> None:
    """Start the high-water mark of resident memory again from the present."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_mib(run: Callable[[], object]) -> float:
    """What a call takes at most above what there was before: as torch allocates it on a GPU, else resident."""
    if not torch.cuda.is_available():
        forget_peak()
        before = resident_mib("VmRSS")
        run()
        return resident_mib("VmHWM") - before
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def peak_allocated(run: Callable[[], object]) -> int:
    """Bytes of tensors that were alive at most above what there was before, as torch's profiler reports allocations.

    It is for a CPU, where :func:`peak_mib` sees whole pages, and misses what comes from memory that the C library has
    kept for later.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def step_peak_mib(run: Callable[[], object]) -> float:
    """What one step in a process that has made others takes at most above what there was before, of tensors alone."""
    return peak_mib(run) if torch.cuda.is_available() else peak_allocated(run) / MIB


def weights_mib(model: nn.Module) -> float:
    """The size of all parameters."""
    return sum(parameter.nbytes for parameter in model.parameters()) / MIB


def activations_mib(model: nn.Module, batch: Mapping[str, Tensor]) -> float:
    """The peak of one forward and backward pass without weight gradients, which is part of the peak of any pass."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    embeddings = model.get_input_embeddings()
    handle = embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_())
    model.requires_grad_(False)
    try:
        return peak_mib(lambda: model(**batch, use_cache=False).loss.backward())
    finally:
        handle.remove()
        for parameter in trainable:
            parameter.requires_grad_(True)


def kept_mib(model: nn.Module, batch: Mapping[str, Tensor]) -> float:
    """The peak of one pass that keeps the activations of a training step, without a model of gradients.

    The weights of the layers require gradients, so that autograd keeps the inputs of every linear, and each gradient is
    dropped as soon as it arrives. Embeddings and head, whose gradients would be the largest by far, are frozen.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    handles = [embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_())]
    frozen = {*embeddings.parameters(), *head.parameters()}
    for parameter in trainable:
        if parameter in frozen:
            parameter.requires_grad_(False)
        else:
            drop = parameter.register_post_accumulate_grad_hook(lambda one: setattr(one, "grad", None))
            handles.append(drop)
    try:
        return peak_mib(lambda: model(**batch, use_cache=False).loss.backward())
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trainable:
            parameter.requires_grad_(True)


def rounded(figures: Mapping[str, object]) -> dict[str, object]:
    """Figures in MiB as a record has them, to a tenth."""
    return {name: round(value, 1) if isinstance(value, float) else value for name, value in figures.items()}


def available_memory() -> int:
    """Bytes that can be allocated without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable")
