"""``python -m benchmarks gpu | tune | glue``: speed on the GPU that is here, and quality. ``--help`` says more."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: Of the command line.

    Returns:
        Exit status.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure speed, and quality.")
    commands = parser.add_subparsers(dest="command", required=True)
    gpu = commands.add_parser("gpu", help="run the kernels' tests, then measure what is not recorded yet")
    gpu.add_argument("--only", nargs="+", default=[], metavar="PART", help="files of benchmarks/gpu, or FILE/PART")
    gpu.add_argument("--seconds", type=float, default=420, help="begin no part after so long (default: %(default)s)")
    gpu.add_argument("--tested", action="store_true", help="the tests passed on this device just before")
    commands.add_parser("glue", help="FISH-Tuning and its controls on GLUE, on any machine", add_help=False)
    tune = commands.add_parser("tune", help="time tiles of the kernels and write a table; nothing else uses it")
    for command in (gpu, tune):
        command.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
        command.add_argument("--revision", metavar="TEXT", help="what the sources are, where git does not say it")
    options, rest = parser.parse_known_args(arguments)
    if options.command == "glue":
        from benchmarks import glue

        glue.main(rest)
        return 0
    parser.parse_args(arguments)  # which refuses what it does not know
    if not torch.cuda.is_available():
        print("No CUDA device is here, and a CPU's times say nothing about it: nothing is measured.", file=sys.stderr)
        return 2

    if options.command == "tune":
        from benchmarks.gpu._tune import tune as run_tune

        return run_tune(options.results, options.revision)
    from benchmarks.gpu import _session

    device = torch.device("cuda", torch.cuda.current_device())
    how = (options.results, options.revision, options.only, options.seconds, options.tested)
    try:
        return _session.run(_session.discover(), device, *how)
    except _session.RefusedError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
