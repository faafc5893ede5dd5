"""What every measurement shares: records and their origin, processes, timing in turns, and the commands."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
