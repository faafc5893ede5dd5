"""Messages of the library about its arguments, in the words of the command line."""

from __future__ import annotations

import pytest

pytest.importorskip("typer")

from fishkern.commands.wording import in_options


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
