"""Peak memory of one provider, in a process of its own: ``python -m benchmarks.memory PROVIDER CASE``.

Prints one JSON object, in MiB: resident memory with the model loaded, the peak during the pass, the size of weights
and accumulators, and what one forward and backward pass of the same batch without weight gradients takes, which is the
activations' part of any pass.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

MIB = 2**20


def peak_memory(provider: str, case: object) -> dict[str, float]:
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


def main(provider: str, described: str) -> None:
    import torch

    from benchmarks.cases import WholePass
    from benchmarks.providers import PROVIDERS

    case = eval(described, {"WholePass": WholePass})
    model, data = case.model(), case.data()
    weights = sum(parameter.nbytes for parameter in model.parameters()) / MIB
    embeddings = model.get_input_embeddings()

    def activations() -> None:
        """Forward and backward without the weights' gradients."""
        model.requires_grad_(False)
        handle = embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_())
        model(**data[0], use_cache=False).loss.backward()
        handle.remove()
        model.requires_grad_(True)

    with torch.no_grad():
        model(**{key: value[:1, :8] for key, value in data[0].items()})  # libraries allocate on first use
    activations_peak = _peak_of(activations)
    peak = _peak_of(lambda: PROVIDERS[provider](model, data[:2]))
    figures = {"weights_mib": weights, "activations_mib": activations_peak, "peak_mib": peak}
    print(json.dumps({key: round(value, 1) for key, value in figures.items()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
