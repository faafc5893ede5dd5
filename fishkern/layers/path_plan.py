"""What a survey decides: which path computes each parameter of a pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fishkern.layers.rules import factored
from fishkern.layers.site import Idle, Site


@dataclass(frozen=True)
class Plan:
    """Which path computes each parameter of a pass.

    Args:
        sites: Modules whose calls are captured.
        loop: Parameters that need the loop over the whole model, with the reason in words.
        reused: Parameters used more than once in a forward pass.
        idle: Modules that share a parameter with captured ones, and that the surveyed examples did not call.
    """

    sites: tuple[Site, ...]
    loop: Mapping[str, str]
    reused: frozenset[str] = frozenset()
    idle: tuple[Idle, ...] = ()

    @property
    def paths(self) -> dict[str, tuple[str, str]]:
        """Path (``"fused"``, ``"generic"`` or ``"loop"``) and reason for each parameter, by canonical name."""
        paths = {key: ("loop", reason) for key, reason in self.loop.items()}
        for site in self.sites:
            path = ("fused", "") if site.layer else ("generic", f"through {site.path} ({type(site.module).__name__})")
            paths |= dict.fromkeys(site.keys.values(), path)
        return paths

    @property
    def keys_with_factors(self) -> frozenset[str]:
        """Parameters all of whose uses give their gradients as activations and output gradients."""
        kinds: dict[str, list[bool]] = defaultdict(list)
        for site in self.sites:
            inside = factored(site)
            for name, key in site.keys.items():
                kinds[key].append(name in inside)
        return frozenset(key for key, factors in kinds.items() if all(factors) and key not in self.loop)

    @property
    def uses(self) -> dict[str, frozenset[tuple[Any, ...]]]:
        """What computes each parameter outside of the loop: of every use the site, but for whether it is settled."""
        uses: dict[str, set[tuple[Any, ...]]] = defaultdict(set)
        for site in self.sites:
            how = (site.path, site.layer, site.layout, site.block, site.order, site.entry)
            how += (site.sliced, site.picked, site.rewritten, site.axis)
            for name, key in site.keys.items():
                uses[key].add((name, *how))
        return {key: frozenset(each) for key, each in uses.items()}

    @property
    def unsettled(self) -> frozenset[str]:
        """Parameters of sites whose layout no gradient has confirmed."""
        return frozenset(key for site in self.sites if not site.settled for key in site.keys.values())

    def with_loop(self, reasons: Mapping[str, str]) -> Plan:
        """Move parameters to the loop.

        Args:
            reasons: Why, in words, by canonical name.

        Returns:
            The changed plan.
        """
        others = self.only({key for site in self.sites for key in site.keys.values()} - reasons.keys())
        return replace(others, loop={**self.loop, **reasons})

    def only(self, names: Collection[str]) -> Plan:
        """Restrict the plan to some parameters.

        Args:
            names: Their canonical names.

        Returns:
            The smaller plan.
        """
        sites = []
        for site in self.sites:
            if keys := {name: key for name, key in site.keys.items() if key in names}:
                sites.append(replace(site, keys=keys))
        loop = {key: reason for key, reason in self.loop.items() if key in names}
        return Plan(tuple(sites), loop, self.reused, tuple(one for one in self.idle if one.key in names))
