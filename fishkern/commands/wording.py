"""What the library says of its arguments, in the words of the command line."""

from __future__ import annotations

import inspect
import re
import shlex
from functools import cache

_PHRASES = (
    (r"Write one with Statistics\.save", "Statistics are made by fishkern estimate"),
    (r"Write one with Selection\.save", "A selection is made by fishkern select"),
    (r"Write one with (Delta\.save|fishkern\.selection\.save_start)", "It is made by fishkern tune"),
    (r"Pass parameters='all' or a predicate", "Name them with --parameters, '*' for all"),
    (r"estimate with DiagonalFisher\(\)", "estimate without --draws, --fisher-type and --unit"),
    (r"parameters='all'", "--parameters '*'"),
    (r"with parameters=(lambda name, parameter: \.\.\.)?", "by naming the others with --parameters"),
    (r"fishkern\.SketchedFisher", "--draws 8"),
    (r"give exactly one budget of .* and match=, got ([\w, ]+)", r"give one of --density, --k and --trainable, got \1"),
    (r"either k or density", "either --k or --density"),
    (r"\bPass likelihood=", "In Python, pass likelihood="),
    (r"\bmax_examples\b", "--samples"),
    (r"\bcheck=False\b", "--no-check"),
)
"""What is said otherwise as a whole."""

_ELSEWHERE = {"parameters", "order", "dtype"}  # words that the library also uses of other things


def in_options(message: str) -> str:
    """Put the options of the command line where a message of the library names an argument.

    Args:
        message: ``"never='typo*' matches no name"``.

    Returns:
        ``"--never 'typo*' matches no name"``.
    """
    for said, instead in _PHRASES:
        message = re.sub(said, instead, message)
    names = "|".join(sorted(_arguments(), key=len, reverse=True))
    # not in a path or a quotation, nor inside a call such as CausalLM(reduction='mean'), which is a value of its own
    message = re.sub(rf"(?<![\w./'-])(?<!\w\()({names})=('[^']*'|\[[^\]]*\]|[\w.,+-]*[\w])", _option, message)
    message = re.sub(rf"^({names})(?= (must|is) )", lambda found: _spelled(found[1]), message)
    several = "|".join(name for name in _arguments() if "_" in name)
    return re.sub(rf"(?<![\w./'-])({several})\b(?![='])", lambda found: _spelled(found[1]), message)


def _option(found: re.Match[str]) -> str:
    name, value = found[1], found[2]
    if value == "True":
        return _spelled(name)
    return f"{_spelled(name)} {shlex.quote(value.strip(chr(39)))}"


def _spelled(name: str) -> str:
    return f"--{name.replace('_', '-')}"


@cache
def _arguments() -> frozenset[str]:
    """Every name that is an option of a subcommand and, in the library, an argument."""
    from fishkern.commands import COMMANDS

    return frozenset(name for command in COMMANDS for name in inspect.signature(command).parameters) - _ELSEWHERE
