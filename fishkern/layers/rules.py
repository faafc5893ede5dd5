"""Which rule serves a module, and which rules give the gradients of a site as activations and output gradients."""

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
from fishkern.names import listed

LAYERS: tuple[Layer, ...] = (
    Linear(), QuantizedLinear(), Conv1D(), Twins(), Embedding(), LayerNorm(), Convolution(), Experts(),
    AdaptedExperts(), Router(), RMSScale(), LayerNormScale(), Factor(), OnePlusFactor(), Scale(),
)  # fmt: skip
"""The rules, first match first. A new kind of layer is one more entry."""

OWN = "fishkern_layer"
"""Name of the attribute by which a module, or its class, brings a rule of its own."""


def rules_for(module: nn.Module) -> tuple[Layer, ...]:
    """List the rules that may serve a module.

    Args:
        module: Any module.

    Returns:
        Those of modules that several processes compute together, if it is one; else :data:`LAYERS`, after the rule that
        the module brings itself.

    Raises:
        TypeError: What it brings is not a :class:`Layer`.
        ValueError: That covers a parameter that the module does not have.
    """
    if hosts.split_of(module) is not None:
        return SPLIT_LAYERS
    own = getattr(module, OWN, None)
    if own is None:
        return LAYERS
    if not isinstance(own, Layer):
        given = own.__name__ if isinstance(own, type) else type(own).__name__
        raise TypeError(
            f"{OWN} of a {type(module).__name__} must be an instance of a fishkern.layers.Layer, got "
            f"{'the class ' if isinstance(own, type) else ''}{given}."
        )
    known = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    if unknown := sorted(set(own.covers(module)).difference(known)):
        raise ValueError(
            f"{type(own).__name__}.covers names {listed(unknown)}, and a {type(module).__name__} has {listed(known)}."
        )
    return (own, *LAYERS)


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
