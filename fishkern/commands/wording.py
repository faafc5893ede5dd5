"""Messages of the library about its arguments, put into the words of the command line."""

from __future__ import annotations

import inspect
import re
import shlex
from functools import cache

_PHRASES = (
    (r"Write one with Statistics\.save", "Statistics are made by fishkern estimate"),
    (r"Write one with Selection\.save", "A selection is made by fishkern select"),
    (r"Write one with (Delta\.save|fishkern\.selection\.save_start)", "It is made by fishkern tune"),
    (r"Write one with Freezer\.save", "It is made by fishkern tune --method fisher-adaptune"),
    (r"Pass parameters='all', patterns of names or a predicate", "Name them with --parameters, '*' for all"),
    (
        r"pass the recipe that they were estimated with as estimator=",
        "the command verifies the empirical Fisher of examples; in Python, pass another recipe as estimator=",
    ),
    (r"parameters='all'", "--parameters '*'"),
    (r"with parameters=(lambda name, parameter: \.\.\.)?", "by naming the others with --parameters"),
    (r"fishkern\.SketchedFisher", "--draws 8"),
    (r"give exactly one budget of .* and match=, got ([\w, ]+)", r"give one of --density, --k and --trainable, got \1"),
    (r"either k or density", "either --k or --density"),
    (r"pass token_layers=\[\]", "give --token-layers none"),
    (r"\bPass likelihood=", "In Python, pass likelihood="),
    (r"choose a scaling such as 1 or 2", "choose an --alpha that is a multiple of the rank"),
    (r"Make the call that \S+ is of, or delete it", "Give the options of then, or --restart"),
    (r", which checkpoint= names", ""),
    (r"Or give another name, to begin", "Or give another --out, or --restart to begin"),
    (r"Seed the sampler, as by DataLoader\(.*?\)\)\. ", ""),
    (r"\bmax_examples\b", "--samples"),
    (r"\bcheck=False\b", "--no-check"),
)
"""Phrases that are replaced as a whole, as regular expressions."""

_AMBIGUOUS = {"parameters", "order", "dtype"}  # the library uses these words for other things, too


def in_options(message: str) -> str:
    """Put the options of the command line where a message of the library names an argument.

    Args:
        message: ``"never='typo*' matches no name"``.

    Returns:
        ``"--never 'typo*' matches no name"``.
    """
    for phrase, replacement in _PHRASES:
        message = re.sub(phrase, replacement, message)
    names = "|".join(sorted(_arguments(), key=len, reverse=True))
    # Not in a path or a quotation, nor inside a call such as CausalLM(reduction='mean'), which is a value itself.
    message = re.sub(rf"(?<![\w./'-])(?<!\w\()({names})=('[^']*'|\[[^\]]*\]|[\w.,+-]*[\w])", _option, message)
    message = re.sub(rf"(?<![\w./'-])({names})=(?=[\s.,;:)]|$)", lambda match: _spelled(match[1]), message)  # no value
    message = re.sub(r"(?<!\w)(--[a-z-]+)=(?=[\s.,;:)]|$)", r"\1", message)
    message = re.sub(rf"^({names})(?= (must|is) )", lambda match: _spelled(match[1]), message)
    several = "|".join(name for name in _arguments() if "_" in name)
    return re.sub(rf"(?<![\w./'-])({several})\b(?![='])", lambda match: _spelled(match[1]), message)


def _option(match: re.Match[str]) -> str:
    name, value = match[1], match[2]
    if value == "True":
        return _spelled(name)
    return f"{_spelled(name)} {shlex.quote(value.strip(chr(39)))}"


def _spelled(name: str) -> str:
    return f"--{name.replace('_', '-')}"


@cache
def _arguments() -> frozenset[str]:
    """Give every name that is an option of a subcommand and, in the library, an argument."""
    from fishkern.commands import COMMANDS

    return frozenset(name for command in COMMANDS for name in inspect.signature(command).parameters) - _AMBIGUOUS
