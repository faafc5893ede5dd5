"""The options of ``fishkern tune --method tr-pts``: which entries of the model itself train, and on which tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from typer import Option

from fishkern.arguments import fraction_of
from fishkern.commands.numbers import numbers_in
from fishkern.methods.tr_pts import KEEP, SPARSEST
from fishkern.selection.contribution_topk import USUAL_TOP

NONE = "none"

_TR_PTS = "TR-PTS"


@dataclass(frozen=True)
class Connections:
    """Which connections of the model train, and how many tokens its layers keep; of ``--method tr-pts``."""

    top: Annotated[
        float | None,
        Option(
            metavar="T",
            help="The fraction of the model's weights with the most Fisher information. Layers with more of these "
            "train more connections of each neuron. A small fraction trains more, not less. Or give --density.",
            rich_help_panel=_TR_PTS,
            show_default=f"{USUAL_TOP} without --density",
        ),
    ] = None
    least_per_row: Annotated[
        int | None,
        Option(
            min=1,
            metavar="N",
            help="Connections of each neuron in the layer with the fewest.",
            rich_help_panel=_TR_PTS,
            show_default="1",
        ),
    ] = None
    most_per_row: Annotated[
        int | None,
        Option(
            min=1,
            metavar="N",
            help="The most connections of a neuron.",
            rich_help_panel=_TR_PTS,
            show_default="no limit",
        ),
    ] = None
    keep: Annotated[
        float | None,
        Option(
            metavar="SHARE",
            help="In each of --token-layers keep this share of the image tokens; the others become one.",
            rich_help_panel=_TR_PTS,
            show_default=str(KEEP),
        ),
    ] = None
    token_layers: Annotated[
        str,
        Option(
            metavar="LAYERS",
            help="Layers that drop tokens, such as 3-5 or 3,5, counted from 0; sparsest: the third with the fewest "
            "entries in the top set; none: all layers keep all tokens.",
            rich_help_panel=_TR_PTS,
            show_default=SPARSEST,
        ),
    ] = ""

    @property
    def settings(self) -> dict[str, Any]:
        """The options, defaults included: runs with the same ones do the same."""
        layers = self._layers
        keep = None if layers == [] else self.keep or KEEP
        return {"least_per_row": self.least_per_row or 1, "keep": keep, "token_layers": layers}

    @property
    def arguments(self) -> dict[str, Any]:
        """The options as arguments of :func:`fishkern.tr_pts`, those that were not given left out.

        Raises:
            ValueError: An option is out of range, or they do not fit together.
        """
        layers = self._layers
        if layers == [] and self.keep is not None:
            raise ValueError("--token-layers none keeps all tokens: leave out --keep.")
        if self.keep is not None:
            fraction_of(self.keep, "--keep")
        given = {name: getattr(self, name) for name in ("top", "least_per_row", "most_per_row", "keep")}
        return {name: value for name, value in given.items() if value is not None} | {"token_layers": layers}

    @property
    def _layers(self) -> Literal["sparsest"] | list[int]:
        if self.token_layers in ("", SPARSEST):
            return SPARSEST
        return [] if self.token_layers == NONE else numbers_in(self.token_layers, "--token-layers")
