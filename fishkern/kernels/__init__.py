"""The top-level ``kernels/`` folder, for a checkout; the wheel has that folder here, and not this file."""

from pathlib import Path

__path__.append(str(Path(__file__).parents[2] / "kernels"))
