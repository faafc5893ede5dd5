"""The layer rules in order, and which of them give the gradients of a site as activations and output gradients."""

from __future__ import annotations

from torch import nn

from fishkern import hosts
from fishkern.layers.adapted_experts import AdaptedExperts
from fishkern.layers.base import Layer
from fishkern.layers.convolution import Convolution
from fishkern.layers.embedding import Embedding
from fishkern.layers.experts import Experts
from fishkern.layers.layer_norm import LayerNorm
from fishkern.layers.linear import Conv1D, Linear, QuantizedLinear
from fishkern.layers.router import Router
from fishkern.layers.scale import Factor, LayerNormScale, OnePlusFactor, RMSScale, Scale
from fishkern.layers.site import Site
from fishkern.layers.tensor_parallel import SPLIT_LAYERS
from fishkern.layers.twins import Twins

LAYERS: tuple[Layer, ...] = (
    Linear(), QuantizedLinear(), Conv1D(), Twins(), Embedding(), LayerNorm(), Convolution(), Experts(),
    AdaptedExperts(), Router(), RMSScale(), LayerNormScale(), Factor(), OnePlusFactor(), Scale(),
)  # fmt: skip
"""The rules, first match first. A new kind of layer is one more entry."""


def rules_for(module: nn.Module) -> tuple[Layer, ...]:
    """List the rules that may serve a module.

    Args:
        module: Any module.

    Returns:
        Those of modules that several processes compute together, if it is one; else :data:`LAYERS`.
    """
    return LAYERS if hosts.split_of(module) is None else SPLIT_LAYERS


def rule_of(module: nn.Module) -> Layer | None:
    """Find the rule of a module.

    Args:
        module: Any module.

    Returns:
        The first rule that covers some of its parameters, if any.
    """
    return next((layer for layer in rules_for(module) if layer.covers(module)), None)


def factored(site: Site) -> dict[str, tuple[nn.Module, Layer]]:
    """List the weights of a site whose gradients come as activations and output gradients.

    Args:
        site: A site: a linear map, or a host with linear maps in it.

    Returns:
        Module and rule of each weight, by its name in the site's module.
    """
    found = {}
    for name in site.keys:
        path, _, own = name.rpartition(".")
        module = site.module if site.layer is not None else site.module.get_submodule(path)
        layer = site.layer if site.layer is not None else rule_of(module)
        if layer is not None and own in layer.covers(module) and layer.gives_factors(own):
            found[name] = module, layer
    return found
