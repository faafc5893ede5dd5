"""Peak memory of one provider, in a process of its own: ``python -m benchmarks.memory PROVIDER CASE``.

Prints one JSON object, in MiB: resident memory with the model loaded, the peak during the pass, the size of weights
and accumulators, and what one forward and backward pass of the same batch without weight gradients takes, which is the
activations' part of any pass. On a GPU it is torch's allocated memory. A rival that fails says why.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

MIB = 2**20
BATCHES = 2  # the second finds the accumulators there


def peak_memory(provider: str, case: object) -> dict[str, Any]:
    """Measure in a fresh process, where freed memory goes back to the system at once."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "benchmarks.memory", provider, repr(case)]
    out = subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1]
    )
    return json.loads(out.stdout.splitlines()[-1])


def _resident(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _peak_of(run) -> float:
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _peak_on_device(run) -> float:
    import torch

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def main(provider: str, described: str) -> None:
    import torch

    from benchmarks import cases
    from benchmarks.providers import RIVALS, in_short

    case = eval(described, vars(cases))
    model, data = case.model(), case.data()
    weights = sum(parameter.nbytes for parameter in model.parameters()) / MIB
    embeddings = model.get_input_embeddings()
    measure = _peak_of if embeddings.weight.device.type == "cpu" else _peak_on_device

    def activations() -> None:
        """Forward and backward without the weights' gradients."""
        model.requires_grad_(False)
        handle = embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_())
        model(**data[0], use_cache=False).loss.backward()
        handle.remove()
        model.requires_grad_(True)

    with torch.no_grad():
        model(data[0]["input_ids"][:1, :8])  # libraries allocate on first use
    if isinstance(case, cases.FullRows):
        small = case.small()
        with suppress(Exception):  # a library's modules are no memory of the pass; what fails says so below
            RIVALS[provider].run(small.model(), small.data())
    figures: dict[str, Any] = {"weights_mib": weights, "activations_mib": measure(activations)}
    try:
        figures["peak_mib"] = measure(lambda: RIVALS[provider].run(model, data[:BATCHES]))
    except Exception as error:
        if provider.startswith("fishkern"):
            raise
        figures["left out"] = in_short(error)
    print(json.dumps({key: round(value, 1) if isinstance(value, float) else value for key, value in figures.items()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
