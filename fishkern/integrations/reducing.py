"""The token reduction of a model that a Trainer trains: from the callback, the checkpoint, or on the model already."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from fishkern import tokens
from fishkern.tokens import TokenReduction


def attach_for_training(model: nn.Module, given: TokenReduction | None, checkpoint: Path | None) -> None:
    """Attach a model's token reduction when training starts, unless it is attached already.

    Args:
        model: Without wrappers; changed in place.
        given: The recipe that the user passes, or ``None``.
        checkpoint: The folder that the training resumes from, or ``None``.

    Raises:
        ValueError: The recipes of checkpoint, callback and model differ, or the model of the checkpoint was trained
            without one.
        UnsupportedModuleError: The tokens of this model cannot be reduced.
    """
    present = tokens.attached(model)
    recipes = {"the callback": given, "the model": present}
    if checkpoint is not None:
        saved = saved_reduction(checkpoint)
        if saved is None and (given or present):
            raise ValueError(
                f"{checkpoint} was trained without token reduction (it has no {tokens.FILE}), and this training would "
                "go on with one: leave out reduction=, or fishkern.tokens.detach(model) first."
            )
        recipes = {"the checkpoint": saved, **recipes}
    named = {whose: recipe for whose, recipe in recipes.items() if recipe is not None}
    if len(set(named.values())) > 1:
        shown = ", ".join(f"{whose} has {recipe}" for whose, recipe in named.items())
        raise ValueError(
            f"the token reductions differ: {shown}. Pass the recipe that the model was trained with, and "
            "fishkern.tokens.detach(model) another one first."
        )
    if named and present is None:
        tokens.attach(model, next(iter(named.values())))


def saved_reduction(checkpoint: Path) -> TokenReduction | None:
    """Load the recipe of a checkpoint.

    Args:
        checkpoint: Its folder.

    Returns:
        The recipe, or ``None`` if the model was trained without one.

    Raises:
        ValueError: The file is damaged.
    """
    file = checkpoint / tokens.FILE
    return TokenReduction.load(file) if file.is_file() else None
