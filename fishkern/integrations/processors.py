"""What turns text and images into a model's inputs, by folder or id."""

from __future__ import annotations

from typing import Any

from fishkern.integrations.hub import explained, locate
from fishkern.integrations.models import Source

MAX_LENGTH = 512


def load_tokenizer(source: Source, named: str | None = None) -> Any:
    """Load the tokenizer of a model.

    Args:
        source: The model.
        named: Another folder or id that holds it.

    Returns:
        A tokenizer of transformers.

    Raises:
        FileNotFoundError: ``named`` is neither here nor to be had.
        ValueError: There is none.
    """
    from transformers import AutoTokenizer

    folder, reason = (source.folder, source.reason) if named is None else locate(named, "tokenizer")
    with explained(folder, "tokenizer", reason, "name another folder or id with --tokenizer."):
        return AutoTokenizer.from_pretrained(folder, local_files_only=reason is not None, trust_remote_code=False)


def load_image_processor(source: Source, named: str | None = None) -> tuple[Any, bool]:
    """Load the image processor of a model, or make a plain one of its config.

    Args:
        source: The model.
        named: Another folder or id that holds it.

    Returns:
        The processor, and whether it was made: then it only resizes to the config's ``image_size`` and scales to
        -1 ... 1.

    Raises:
        FileNotFoundError: ``named`` is neither here nor to be had.
        ValueError: There is none, and the config names no ``image_size``.
    """
    from transformers import AutoImageProcessor, ViTImageProcessorPil

    folder, reason = (source.folder, source.reason) if named is None else locate(named, "image processor")
    try:
        with explained(folder, "image processor", reason):
            options = {"local_files_only": reason is not None, "trust_remote_code": False}
            return AutoImageProcessor.from_pretrained(folder, **options), False
    except (ValueError, FileNotFoundError):
        size = getattr(source.config, "image_size", None)
        if named is not None or not isinstance(size, int):
            raise
        return ViTImageProcessorPil(size={"height": size, "width": size}), True


def text_length(config: Any, tokenizer: Any, asked: int | None) -> int:
    """Decide to how many tokens texts are cut.

    Args:
        config: The model's config.
        tokenizer: Its tokenizer.
        asked: What the user says, or ``None`` for what both allow, 512 at most.

    Returns:
        The number of tokens.

    Raises:
        ValueError: The model has no so many positions.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if asked is not None:
        if positions is not None and asked > positions:
            raise ValueError(f"--max-length {asked} is beyond the {positions} positions of the model.")
        return asked
    return min(MAX_LENGTH, tokenizer.model_max_length, positions or MAX_LENGTH)
