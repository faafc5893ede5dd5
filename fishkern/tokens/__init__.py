"""Token reduction: layers of a vision transformer drop the image tokens that the class token attends to least."""

from fishkern.tokens.attach import attach, attached, detach
from fishkern.tokens.kept import KeptTokens, kept_tokens
from fishkern.tokens.recipe import TokenReduction

__all__ = ["KeptTokens", "TokenReduction", "attach", "attached", "detach", "kept_tokens"]
