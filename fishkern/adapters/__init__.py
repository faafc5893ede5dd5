"""Adapter modules that PEFT lacks: bottlenecks, prefixes on chosen layers, UniPELT."""

from fishkern.adapters.base import Adapter, adapter_parameters, attach, detach, gates, load, save
from fishkern.adapters.bottleneck import BottleneckAdapter
from fishkern.adapters.prefix import PrefixAdapter
from fishkern.adapters.unipelt import UniPELTAdapter

__all__ = [
    "Adapter",
    "BottleneckAdapter",
    "PrefixAdapter",
    "UniPELTAdapter",
    "adapter_parameters",
    "attach",
    "detach",
    "gates",
    "load",
    "save",
]
