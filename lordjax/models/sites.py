"""Sites: the parts of a block that are compressed, each a linear layer or a module.

A *site* is one entry of a plan. Its kind says what it holds, and what its rank means:

* ``linear``  one kernel ``[in, out]``; the rank of its two factors;
* ``qk``      queries and keys; the width of a head in the product ``q @ k.T``;
* ``vo``      values and the output projection; the width of a head's value;
* ``mlp``     up, gate (if there is one) and down; the width of the MLP;
* ``heads``   queries, keys, values and the output projection; the number of key/value heads, each
              with its query heads;
* ``dense``   one kernel that the method does not compress; it counts for the budget.

``qk``, ``vo``, ``mlp`` and ``heads`` are *modules*: layers that share an inner width. A compressed
module has the same layers with a smaller width. There is no ``qk`` where a norm runs over each head
of the queries and keys, because pruning columns of a head changes its norm; and no ``heads`` where
a norm runs over all of them at once.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

from lordjax import names


class Architecture(Protocol):
    """The properties of a config that decide which sites a block has; see `ModelConfig`."""

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate."""
        ...

    @property
    def qk_norm(self) -> bool:
        """Whether a norm runs over each head of the queries and keys."""
        ...

    @property
    def wide_qk_norm(self) -> bool:
        """Whether that norm runs over all heads at once."""
        ...


@dataclasses.dataclass(frozen=True)
class Site:
    """One linear layer or module that is compressed.

    Attributes:
      path: path inside the block: that of the kernel, or of the module.
      stage: order in the forward pass. Sites of lower stages run earlier; sites of one stage do
        not read each other's outputs.
      kind: kind of the site; see the module's docstring.
      kernels: paths of the kernels that become smaller with the rank.
      input_tap: tap of the layer's input; for a module, of its last layer's input.
    """

    path: str
    stage: int
    kind: str
    kernels: tuple[str, ...]
    input_tap: str

    @property
    def layer(self) -> str:
        """Path of the linear layer, which holds the kernel and the bias."""
        return self.path.removesuffix("/kernel")

    @property
    def output_tap(self) -> str:
        """Tap of the layer's output without the bias."""
        return f"{self.layer}/out"


def _linear(path: str, input_tap: str, stage: int) -> Site:
    return Site(path, stage, "linear", (path,), input_tap)


GATE = "mlp/gate/kernel"
LINEAR_SITES: tuple[Site, ...] = (
    _linear("attention/q/kernel", "attention/attention_in", 0),
    _linear("attention/k/kernel", "attention/attention_in", 0),
    _linear("attention/v/kernel", "attention/attention_in", 0),
    _linear("attention/o/kernel", "attention/attention_out", 1),
    _linear(GATE, "mlp/mlp_in", 2),
    _linear("mlp/up/kernel", "mlp/mlp_in", 2),
    _linear("mlp/down/kernel", "mlp/mlp_hidden", 3),
)

MODULE_SITES: tuple[Site, ...] = (
    Site(
        "attention/qk",
        0,
        "qk",
        ("attention/q/kernel", "attention/k/kernel"),
        "attention/attention_in",
    ),
    Site(
        "attention/vo",
        1,
        "vo",
        ("attention/v/kernel", "attention/o/kernel"),
        "attention/attention_out",
    ),
    Site(
        "attention",
        1,
        "heads",
        tuple(f"attention/{name}/kernel" for name in "qkvo"),
        "attention/attention_out",
    ),
    Site(
        "mlp",
        3,
        "mlp",
        (GATE, "mlp/up/kernel", "mlp/down/kernel"),
        "mlp/mlp_hidden",
    ),
)

# The last layer of a module. The module is linear in it, so it can be refitted by least squares.
LAST_LAYER = {
    "vo": "attention/o/kernel",
    "heads": "attention/o/kernel",
    "mlp": "mlp/down/kernel",
}


def sites_for(kinds: frozenset[str], config: Architecture) -> tuple[Site, ...]:
    """Returns the sites of a block, in the order in which they run.

    A kernel that is part of a module is not also a linear site.

    Args:
      kinds: kinds of sites that the method compresses.
      config: the architecture.
    """
    modules = _modules(kinds, config)
    alone = _alone(modules, config) if "linear" in kinds else ()
    return tuple(sorted((*alone, *modules), key=lambda site: site.stage))


def counted_sites(kinds: frozenset[str], config: Architecture) -> dict[str, Site]:
    """Returns all sites that count for the budget, by path.

    These are `sites_for` and, as ``dense`` sites, the kernels that the method does not compress.

    Args:
      kinds: kinds of sites that the method compresses.
      config: the architecture.
    """
    sites = sites_for(kinds, config)
    if "linear" not in kinds:
        alone = _alone(sites, config)
        sites = (*sites, *(dataclasses.replace(site, kind="dense") for site in alone))
    return {site.path: site for site in sites}


def _modules(kinds: frozenset[str], config: Architecture) -> tuple[Site, ...]:
    absent = ({"qk"} if config.qk_norm else set()) | ({"heads"} if config.wide_qk_norm else set())
    return tuple(site for site in MODULE_SITES if site.kind in kinds - absent)


def _alone(modules: tuple[Site, ...], config: Architecture) -> tuple[Site, ...]:
    """Linear sites of the kernels that are in none of the modules."""
    covered = {path for site in modules for path in site.kernels}
    covered |= set() if config.gated else {GATE}
    return tuple(site for site in LINEAR_SITES if site.path not in covered)


def site_path(layer: int, site: Site) -> str:
    """Returns the site's path in the whole model."""
    return f"{names.layer(layer)}/{site.path}"
