"""From energies to the start of an adapter: how many directions of each matrix, which, and how large."""

from fishkern.initialization.init import AdapterInit, ModuleInit

__all__ = ["AdapterInit", "ModuleInit"]
