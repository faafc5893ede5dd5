"""Peak resident memory of a selection from a file, in its own process: ``python -m benchmarks.topk_memory FILE K``.

Prints one JSON object, in MiB: the peak above what was resident before, and the size of the indices, which it includes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.memory import MIB, _peak_of


def peak_memory(path: Path, k: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.topk_memory", str(path), str(k)]
    out = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    return json.loads(out.stdout.splitlines()[-1])


def main(path: str, k: str) -> None:
    import torch

    from fishkern.files import Format, open_tensors
    from fishkern.ops import streaming_topk

    _, stored = open_tensors(path, format=Format("scores", 1, "a benchmark"))
    streaming_topk([torch.rand(10**5)], 100)  # libraries allocate on first use
    found: list[torch.Tensor] = []
    peak = _peak_of(lambda: found.extend(streaming_topk(list(stored.values()), int(k))))
    indices = sum(block.nbytes for block in found) / MIB
    print(json.dumps({"peak_mib": round(peak, 1), "indices_mib": round(indices, 1)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
