"""``python -m benchmarks``: speed against rivals, quality at equal budget, pictures of both. ``--help`` says more."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path

from benchmarks.engine import RESULTS

# By command, a module with main(arguments) and options of its own, and its subject.
STUDIES = {
    "exactness": ("benchmarks.studies.exactness", "how far other squares are from the Fisher, and what that changes"),
    "cheaper-rivals": (
        "benchmarks.studies.cheaper_rivals",
        "what people use instead of the exact Fisher, judged by what it is used for",
    ),
    "precision": ("benchmarks.studies.precision", "what statistics promise of their own top, and what is so"),
    "failures": ("benchmarks.studies.failures", "known failures of rivals, reproduced, and fishkern on the same"),
    "starts": ("benchmarks.studies.starts", "starts of low-rank adapters: FARSS, FILet, those of PEFT, and controls"),
    "freezing": ("benchmarks.studies.freezing", "what stops training: FisherAdapTune, as published, and controls"),
    "tr-pts": ("benchmarks.studies.tr_pts", "TR-PTS: which connections train, which tokens are kept, and controls"),
    "glue": ("benchmarks.studies.glue", "FISH-Tuning and its controls on GLUE, on any machine"),
    "demonstration": (
        "benchmarks.cases.demonstration",
        "a whole LLaMA: Fisher, selection, sparse training, delta, verify",
    ),
    "carry": ("benchmarks.studies.carry", "write 16-bit weights and data for a machine without these files"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: Of the command line.

    Returns:
        Exit status.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in STUDIES:
        module, _ = STUDIES[arguments[0]]
        return import_module(module).main(arguments[1:]) or 0
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command in ("gpu", "tune"):
        return _on_gpu(parser, options)
    if options.command == "run":
        from benchmarks.engine.run import run

        return run(options.cases, options.results, replace=options.replace)
    if options.command == "compare":
        from benchmarks.engine.compare import compare

        return compare(options.ref, options.cases, rounds=options.rounds, only=options.only)
    from benchmarks.engine.plot import plot

    return plot(options.names, options.results)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure speed, and quality; draw what was measured.",
        epilog="benchmarks/README.md says what each measures.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="test the library, then measure and record")
    run.add_argument("cases", nargs="*", metavar="CASE", help="benchmarks/cases/CASE.py (default: all)")
    run.add_argument("--replace", action="store_true", help="drop this machine's earlier records of these cases")
    compare = commands.add_parser("compare", help="measure another revision and this tree, and record nothing")
    compare.add_argument("ref", metavar="REF", help="a revision of git, such as main or a tag")
    compare.add_argument("cases", nargs="*", metavar="CASE", help="benchmarks/cases/CASE.py (default: all)")
    compare.add_argument("--rounds", type=int, default=7, metavar="N", help="default: %(default)s")
    compare.add_argument("--only", default="", metavar="TEXT", help="only runs with TEXT in their names")
    plot = commands.add_parser("plot", help="draw records")
    plot.add_argument("names", nargs="*", metavar="NAME", help="of a file of records (default: all)")
    gpu = commands.add_parser("gpu", help="run the kernels' tests, then measure what is not recorded yet")
    gpu.add_argument("--only", nargs="+", default=[], metavar="PART", help="cases, CASE/PART, or CASE/tests")
    gpu.add_argument("--seconds", type=float, default=520, help="time limit of the whole call (default: %(default)s)")
    gpu.add_argument("--tested", action="store_true", help="leave the tests out; the records say so")
    gpu.add_argument(
        "--patience", type=float, default=4, metavar="N",
        help="stop a part after N times its planned seconds: more under a profiler (default: %(default)s)",
    )  # fmt: skip
    tune = commands.add_parser("tune", help="time tiles of the kernels and write a table; nothing else uses it")
    for command in (gpu, tune):
        command.add_argument("--revision", metavar="TEXT", help="name of the sources, where there is no git")
    for command in (run, plot, gpu, tune):
        command.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    for name, (_, text) in STUDIES.items():
        commands.add_parser(name, help=text)
    return parser


def _on_gpu(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    import torch

    if not torch.cuda.is_available():
        print("There is no CUDA device, and a CPU's times say nothing about one: nothing is measured.", file=sys.stderr)
        return 2
    if options.command == "tune":
        from benchmarks.gpu.tune import tune

        return tune(options.results, options.revision)
    from benchmarks.gpu import session

    device = torch.device("cuda", torch.cuda.current_device())
    settings = {"only": options.only, "seconds": options.seconds, "patience": options.patience}
    settings |= {"revision": options.revision, "skip_tests": options.tested}
    try:
        return session.run(session.cases(), device, options.results, **settings)
    except session.RefusedError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
