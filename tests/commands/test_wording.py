"""Messages of the library about its arguments, in the words of the command line."""

from __future__ import annotations

import ast
import re

import pytest

pytest.importorskip("typer")

from fishkern.commands.wording import _PHRASES, in_options
from tests.support.command import ROOT


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("never='typo*' matches no name", "--never 'typo*' matches no name"),
        ("density must be above 0, got 2", "--density must be above 0, got 2"),
        ("more than max_label_passes=4096. Raise it, or use fisher_type='mc'.",
         "more than --max-label-passes 4096. Raise it, or use --fisher-type mc."),
        ("give either k or density, got k=1 and density=0.1.",
         "give either --k or --density, got --k 1 and --density 0.1."),
        ("check=False leaves it out; or pass allow_zeros=True.", "--no-check leaves it out; or pass --allow-zeros."),
        ("expected format=fishkern.statistics. Write one with Statistics.save.",
         "expected format=fishkern.statistics. Statistics are made by fishkern estimate."),
        ("leave them out with targets=.", "leave them out with --targets."),
        ("take more examples (max_examples= and the data)", "take more examples (--samples and the data)"),
        ("accumulate_on='cpu' keeps them", "--accumulate-on cpu keeps them"),
    ],
)  # fmt: skip
def test_arguments_become_options(said: str, shown: str):
    assert in_options(said) == shown


@pytest.mark.parametrize(
    "said",
    [
        "CausalLM(reduction='mean') and CausalLM(reduction='sum') do not merge",
        "/runs/k=3/density=1.safetensors is damaged",
        "the data has no column 'fisher_type' for --text",
        "row 3 has the label 5; the model knows 0 to 1",
    ],
)
def test_what_is_no_argument_stays(said: str):
    assert in_options(said) == said


@pytest.fixture(scope="module")
def messages() -> list[str]:
    """Every string of the library outside of the commands, with 'x' for a value, and what it says of each format."""
    files = [path for path in (ROOT / "fishkern").rglob("*.py") if path.parent.name != "commands"]
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    plain = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    joined = [node.values for node in nodes if isinstance(node, ast.JoinedStr)]
    formatted = ["".join(part.value if isinstance(part, ast.Constant) else "x" for part in parts) for parts in joined]
    assert any(message.endswith(" Write one with x.") for message in formatted)
    saved_by = [node.value.value for node in nodes if isinstance(node, ast.keyword) and node.arg == "saved_by"]
    return [*plain, *formatted, *(f"Write one with {writer}." for writer in saved_by)]


@pytest.mark.parametrize("phrase", [phrase for phrase, _ in _PHRASES])
def test_every_phrase_is_one_of_the_library(messages, phrase):
    """Else its message was reworded, and reaches the command line in the words of Python."""
    assert any(re.search(phrase, message) for message in messages)
