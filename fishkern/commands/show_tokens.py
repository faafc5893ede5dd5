"""What ``fishkern show`` says of a token reduction, and what it draws of it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fishkern as fk
from fishkern import hosts, tokens
from fishkern.commands.output import console, note, waiting
from fishkern.integrations import hub, models, processors
from fishkern.integrations.columns import Head
from fishkern.integrations.tasks import task_of_config
from fishkern.report.tables import events_table
from fishkern.report.tokens import count_tokens
from fishkern.tokens import KeptTokens, TokenReduction

TASK, DELTA = "image-classification", "delta.safetensors"


@dataclass(frozen=True)
class _Seen:
    """Images as a model sees them, and what it keeps of them."""

    names: list[str]
    colours: Tensor  # [N, 3, H, W], from 0 to 1
    kept: list[KeptTokens]


def show_tokens(
    reduction: TokenReduction, file: Path, model: str, images: Sequence[Path], picture: Path | None, *, as_json: bool
) -> None:
    """Print which layers drop tokens, and draw what they leave of images.

    Args:
        reduction: What the file holds.
        file: Its name.
        model: Folder or id of the model; empty to say no more than the recipe does.
        images: Files of images.
        picture: Where to save the picture, if one is asked for.
        as_json: Whether to print JSON instead of tables.

    Raises:
        ValueError: Of model, images and picture one is missing, or they do not fit together.
        OSError: A file is missing, or the model is not on this machine and cannot be had.
    """
    if len({bool(model), bool(images), picture is not None}) > 1:
        raise ValueError(
            "which patches are left depends on model and image: give --model, --image and --plot, or none."
        )
    seen = _seen(reduction, file, model, images) if images else None
    counts = [] if seen is None else count_tokens(reduction, math.prod(seen.kept[0].grid))
    if as_json:
        more = {"tokens": [asdict(count) for count in counts]} if counts else {}
        print(json.dumps({"file": str(file), **asdict(reduction), **more}, indent=2))
    else:
        console().print(f"{file}: {_in_words(reduction)}")
        if counts:
            rows = [(str(one.layer), f"{one.entering:,}", f"{one.leaving:,}") for one in counts]
            console().print(events_table(rows, ("layer", "image tokens before", "after")))
    if seen is not None and picture is not None:
        from fishkern.report.plots import save
        from fishkern.report.tokens_picture import draw_kept_tokens

        title = f"patches that are still tokens ({model}, each layer keeps {reduction.keep:.0%})"
        save(draw_kept_tokens(seen.colours, seen.kept, names=seen.names, title=title), picture)


def _in_words(reduction: TokenReduction) -> str:
    layers, many = ", ".join(map(str, reduction.layers)), len(reduction.layers) > 1
    where = "between attention and MLP" if reduction.place == "before_mlp" else "after the layer"
    rest = "the others become one token" if reduction.merge else "the others are dropped"
    return (
        f"a token reduction in layer{'s' * many} {layers}, {'each of which' if many else 'which'} keeps "
        f"{reduction.keep:.0%} of its image tokens, {where}; {rest}"
    )


def _seen(reduction: TokenReduction, file: Path, name: str, images: Sequence[Path]) -> _Seen:
    opened = [_opened(path) for path in images]
    with waiting("loading model"), hub.quiet() as warned:
        source = models.find(name)
        processor, _ = processors.load_image_processor(source)
        model = _model(source, file.with_name(DELTA))
    for text in warned:
        note(text)
    tokens.attach(model, reduction)
    pixels = [processor(image, return_tensors="pt")["pixel_values"][0] for image in opened]
    if len({image.shape for image in pixels}) > 1:
        raise ValueError("the model sees these images in different sizes: draw one at a time.")
    batch = torch.stack(pixels)
    kept = tokens.kept_tokens(model, batch.to(next(model.parameters())))
    return _Seen(["/".join(path.parts[-2:]) for path in images], _colours(batch, processor), kept)


def _model(source: models.Source, trained: Path) -> nn.Module:
    """Load the model, with the trained values that lie beside the reduction."""
    delta = fk.Delta.load(trained) if trained.is_file() else None
    head = None
    if delta is not None and task_of_config(source.config) != TASK:  # its head is in the delta alone
        sizes = [shape[0] for name, shape in delta.selection.shapes.items() if hosts.is_head(name) and shape]
        head = Head(sizes[-1]) if sizes else None
    models.check_task(source, TASK)
    model, _ = models.load(source, TASK, head=head, device="cpu")
    if delta is None:
        return model
    try:
        fk.apply_delta(model, delta)
    except ValueError as error:
        raise ValueError(
            f"{trained}: {error} (To see MODEL without it, copy the token reduction into another folder.)"
        ) from None
    note(f"with the trained values of {trained}")
    return model


def _opened(path: Path) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(path).convert("RGB")
    except UnidentifiedImageError:
        raise ValueError(f"{path} is no image that can be read.") from None


def _colours(pixels: Tensor, processor: Any) -> Tensor:
    """Undo the normalisation of an image processor."""
    if not getattr(processor, "do_normalize", False):
        return pixels
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (processor.image_mean, processor.image_std))
    return pixels * std + mean
