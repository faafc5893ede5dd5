"""The options of a comparison, and how its tasks are completed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.engine import RESULTS
from benchmarks.studies.comparing.limit import Limit
from benchmarks.studies.comparing.part import Part
from benchmarks.studies.comparing.runs import STAGES

LEFT = 3  # exit status where runs are left


def add_options(parser: argparse.ArgumentParser, *, tasks: Sequence[str], arms: Iterable[str], seeds: int) -> None:
    """Add what every comparison takes; its data and models are its own.

    Args:
        parser: Changed.
        tasks: Their names.
        arms: Their names.
        seeds: How many by default.
    """
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--task", nargs="+", choices=tasks, default=tasks, metavar="TASK", help="any of %(choices)s")
    parser.add_argument("--arms", nargs="+", choices=list(arms), metavar="ARM", help="only these; --list says what is")
    parser.add_argument("--seeds", type=int, default=seeds, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--seconds", type=float, metavar="N", help=f"begin no run that may end later; status {LEFT} if some are left"
    )
    parser.add_argument("--revision", metavar="TEXT", help="name of the sources, where there is no git")
    parser.add_argument("--dry-run", action="store_true", help="few steps of each arm, of which nothing is recorded")
    parser.add_argument("--list", action="store_true", help="say what each arm is, and end")


def say_what_arms_are(arms: Mapping[str, object]) -> int:
    """Print a line for each arm, and give the exit status."""
    for name, arm in arms.items():
        print(f"{name:16} {arm.says}")
    return 0


def complete(parts: Sequence[Part], stage: int, limit: Limit) -> None:
    """Make the runs of a stage that are missing in any task."""
    for part in parts:
        part.complete(stage, limit)


def carry_out(parts: Sequence[Part], given: argparse.Namespace) -> int:
    """Try the arms of every part, or make the runs that are missing and print a table for each.

    Args:
        parts: The comparison of each task.
        given: The options.

    Returns:
        The exit status.
    """
    if given.dry_run:
        return report([line for part in parts for line in part.try_arms()])
    limit = Limit(given.seconds)
    for stage in range(STAGES):
        complete(parts, stage, limit)
    return conclude(parts, given.seeds, limit)


def conclude(parts: Sequence[Part], seeds: int, limit: Limit) -> int:
    """Print the tables, name the arms that failed, and give the exit status."""
    for part in parts:
        print(f"{part.log.table(part.arms, seeds)}\n")
    failed = report([line for part in parts for line in part.failed.values()])
    return failed or (LEFT if limit.reached else 0)


def report(failed: list[str]) -> int:
    """Name the arms that failed, and give the exit status."""
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0
