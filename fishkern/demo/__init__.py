"""``fishkern demo``: a real model, its exact Fisher, the loop that it equals, the files that stay, and an adapter."""

from fishkern.demo.steps import run

__all__ = ["run"]
