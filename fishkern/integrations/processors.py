"""Tokenizers and image processors, from a folder or an id."""

from __future__ import annotations

from typing import Any

from fishkern.integrations.hub import explained, locate
from fishkern.integrations.models import Source

MAX_LENGTH = 512


def load_tokenizer(source: Source, named: str | None = None) -> Any:
    """Load the tokenizer of a model.

    Args:
        source: The model.
        named: Another folder or id to load it from.

    Returns:
        A tokenizer of transformers.

    Raises:
        FileNotFoundError: ``named`` is not on this machine, and the hub does not have it or cannot be asked.
        ValueError: There is no tokenizer.
    """
    from transformers import AutoTokenizer

    folder, reason = (source.folder, source.reason) if named is None else locate(named, "tokenizer")
    with explained(folder, "tokenizer", reason, "name another folder or id with --tokenizer."):
        return AutoTokenizer.from_pretrained(folder, local_files_only=reason is not None, trust_remote_code=False)


def load_image_processor(source: Source, named: str | None = None) -> tuple[Any, bool]:
    """Load the image processor of a model, or make a plain one from its config.

    Args:
        source: The model.
        named: Another folder or id to load it from.

    Returns:
        The processor, and whether it is a plain one, which only resizes to the config's ``image_size`` and scales to
        -1 ... 1.

    Raises:
        FileNotFoundError: ``named`` is not on this machine, and the hub does not have it or cannot be asked.
        ValueError: There is no processor, and the config has no ``image_size``.
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


def text_length(config: Any, tokenizer: Any, requested: int | None) -> int:
    """Decide to how many tokens texts are cut.

    Args:
        config: The model's config.
        tokenizer: Its tokenizer.
        requested: The user's number, or ``None`` for as many as both allow, 512 at most.

    Returns:
        The number of tokens.

    Raises:
        ValueError: The model has fewer positions.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if requested is not None:
        if positions is not None and requested > positions:
            raise ValueError(f"--max-length {requested} is beyond the {positions} positions of the model.")
        return requested
    return min(MAX_LENGTH, tokenizer.model_max_length, positions or MAX_LENGTH)
