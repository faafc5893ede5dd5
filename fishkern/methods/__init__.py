"""Published fine-tuning methods, one file each, composed of the rooms before this one."""

from fishkern.methods.fish_tuning import fish_tuning

__all__ = ["fish_tuning"]
