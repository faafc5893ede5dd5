"""The recipe of token reduction, and the file that it is saved in."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable
from dataclasses import KW_ONLY, asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal, get_args

from fishkern.arguments import count_of, fraction_of, one_of
from fishkern.files import Format, atomic_write, check_format, check_target, in_brief, parsing, read_json

Place = Literal["before_mlp", "after_layer"]

FILE = "token_reduction.json"
FORMAT = Format("fishkern.token_reduction", version=1, saved_by="TokenReduction.save")


@dataclass(frozen=True)
class TokenReduction:
    """Recipe that drops the least attended image tokens in some layers of a vision transformer.

    In each of the layers, the T image tokens that enter it are ranked by the class token's attention: its row of
    softmax(q k^T * scaling), averaged over the heads. The first n = max(1, floor(keep * T)) stay, in their order. The
    rest become one token behind them, their mean weighted by the same attention. All later layers, and the layers' own
    MLPs, see n + 1 image tokens. The merged one is an ordinary image token to them. Class, distillation and register
    tokens always stay, and do not count.

    This is the token half of TR-PTS (Luo et al., 2025, arXiv:2507.22872), in the placement of EViT (Liang et al., 2022,
    arXiv:2202.07800), between a layer's attention and its MLP. The published code of TR-PTS was never released: where
    in a layer the tokens go, and that heads are averaged, is a reconstruction.

    Args:
        layers: Numbers of the layers that reduce, from the input, starting at 0.
        keep: Share of the image tokens that stay, in (0, 1].
        merge: Whether the rest becomes one token; if not, it is dropped.
        place: ``"before_mlp"``, or ``"after_layer"``, which needs no knowledge of the layer's own forward pass, and
            whose MLP sees all tokens.

    Raises:
        TypeError: A layer is not an integer, or ``keep`` is not a number.
        ValueError: There is no layer, one is negative or given twice, or another argument has no such value.
    """

    layers: tuple[int, ...]
    keep: float = 0.95
    _: KW_ONLY
    merge: bool = True
    place: Place = "before_mlp"

    def __post_init__(self) -> None:
        if not isinstance(self.layers, Iterable) or isinstance(self.layers, str):
            raise TypeError(f"layers takes numbers of layers, such as [3, 6, 9]; got {self.layers!r}.")
        layers = tuple(sorted(count_of(number, "a number in layers") for number in self.layers))
        if not layers or len(set(layers)) < len(layers):
            raise ValueError(f"layers must name at least one layer, and each once; got {list(layers)}.")
        if not isinstance(self.merge, bool):
            raise TypeError(f"merge must be True or False, got {self.merge!r}.")
        place = one_of(self.place, get_args(Place), "place")
        vars(self).update(layers=layers, keep=fraction_of(self.keep, "keep"), place=place)

    @property
    def share(self) -> Fraction:
        """``keep`` as the decimal number that it prints as: 0.29 of 100 is 29, where ``int(0.29 * 100)`` is 28."""
        return Fraction(repr(self.keep))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Save the recipe, as JSON with the name and version of the format.

        Args:
            path: The file, by custom ``token_reduction.json``. An older one is replaced.

        Returns:
            The file.

        Raises:
            OSError: It cannot be written.
        """
        check_target(path, FILE)
        header = {"format": FORMAT.name, "format_version": str(FORMAT.version)}
        with atomic_write(path, "w") as file:
            file.write(json.dumps({**header, **asdict(self)}, indent=2) + "\n")
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TokenReduction:
        """Load a recipe.

        Args:
            path: What :meth:`save` wrote.

        Returns:
            The recipe.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is damaged, of a newer version, or no recipe.
        """
        if not (path := Path(path)).is_file():
            inside = "it is a folder, and a file in it is expected" if path.is_dir() else "no such file"
            raise FileNotFoundError(errno.ENOENT, f"nothing to load at {in_brief(path)}: {inside}.")
        with parsing(f"{path} is damaged"):
            content = read_json(path.read_bytes())
            if not isinstance(content, dict):
                raise ValueError("it is no JSON object")
        header = {key: content.pop(key) for key in ("format", "format_version") if key in content}
        check_format(path, header, FORMAT)
        with parsing(f"{path} holds no valid {FORMAT.noun}"):
            if content.keys() != {"layers", "keep", "merge", "place"} or not isinstance(content["layers"], list):
                raise ValueError(f"its entries are {in_brief(sorted(content), 80)}")
            return cls(**content)
