"""The recipe and its file."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch

from fishkern.tokens import TokenReduction

RECIPES = [
    TokenReduction([2]),
    TokenReduction((4, 7, 10), 0.7, merge=False),
    TokenReduction(range(12), 1, place="after_layer"),
]


def test_arguments_of_any_library_become_plain():
    recipe = TokenReduction(np.array([7, 4]), np.float32(0.5))
    assert recipe == TokenReduction(torch.tensor([4, 7]), 0.5) == TokenReduction([7, 4], 0.5)
    assert recipe.layers == (4, 7)
    assert type(recipe.layers[0]) is int
    assert hash(recipe) == hash(TokenReduction([4, 7], 0.5))
    with pytest.raises(FrozenInstanceError):
        recipe.keep = 0.9


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(layers=[]), ValueError, r"at least one layer, and each once; got \[\]"),
        (dict(layers=[1, 1]), ValueError, r"each once; got \[1, 1\]"),
        (dict(layers=[-1]), ValueError, "a number in layers must be at least 0, got -1"),
        (dict(layers=[1.5]), TypeError, "a number in layers must be an integer, got 1.5"),
        (dict(layers=3), TypeError, r"layers takes numbers of layers, such as \[3, 6, 9\]; got 3"),
        (dict(layers="3"), TypeError, "got '3'"),
        (dict(layers=[1], keep=0), ValueError, "keep must be above 0 and at most 1, got 0.0"),
        (dict(layers=[1], keep=1.01), ValueError, "keep must be above 0 and at most 1"),
        (dict(layers=[1], keep="most"), TypeError, "keep must be a number"),
        (dict(layers=[1], merge=0), TypeError, "merge must be True or False, got 0"),
        (dict(layers=[1], place="before"), ValueError, "place must be one of"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        TokenReduction(**arguments)


@pytest.mark.parametrize("recipe", RECIPES, ids=repr)
def test_a_file_gives_the_recipe_back(tmp_path, recipe):
    path = recipe.save(tmp_path / "token_reduction.json")
    assert TokenReduction.load(path) == recipe
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_file_says(tmp_path):
    content = json.loads(RECIPES[1].save(tmp_path / "recipe.json").read_text())
    assert content == {
        "format": "fishkern.token_reduction",
        "format_version": "1",
        "layers": [4, 7, 10],
        "keep": 0.7,
        "merge": False,
        "place": "before_mlp",
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"format": "fishkern.selection"},
            r"holds no fishkern token_reduction: .* format=fishkern.selection",
        ),
        ({"format_version": "2"}, "this fishkern reads up to 1: update fishkern"),
        ({"keep": 2}, r"holds no valid fishkern token_reduction: keep must be .* got 2.0.*Copy or save it again"),
        ({"layers": "12"}, "its entries are"),
        ({"more": 1}, "its entries are"),
        ({"layers": [True]}, "must be an integer, got True"),
    ],
)
def test_a_file_that_says_something_else(tmp_path, change, message):
    path = RECIPES[0].save(tmp_path / "recipe.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        TokenReduction.load(path)


def test_paths_that_are_no_file(tmp_path):
    with pytest.raises(IsADirectoryError, match=r"names a folder.*such as .*token_reduction.json"):
        RECIPES[0].save(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nothing to load at .*none.json: no such file"):
        TokenReduction.load(tmp_path / "none.json")
    with pytest.raises(FileNotFoundError, match="it is a folder"):
        TokenReduction.load(tmp_path)
