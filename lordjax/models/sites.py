"""What can be compressed in a block: a linear layer alone, or layers that share an inner width.

A *site* is one entry of a plan. Its kind says which mathematics applies:

* ``linear``  one kernel ``[in, out]``; the rank of a factor pair;
* ``qk``      queries and keys; the width of a head in the product ``q @ k.T``;
* ``vo``      values and the output projection; the width of a head's value;
* ``mlp``     up (and gate) and down; the width inside;
* ``dense``   one kernel that the method leaves as it is; it counts for the budget.

``qk``, ``vo`` and ``mlp`` are *modules*: compressed, they are the same layers, only narrower. Where
a norm runs over each head of the queries and keys there is no ``qk``: it would see another head.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol


class Architecture(Protocol):
    """What the sites of a block depend on; a `models.config.ModelConfig` is one."""

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate."""
        ...

    @property
    def qk_norm(self) -> bool:
        """Whether a norm runs over each head of the queries and keys."""
        ...


@dataclasses.dataclass(frozen=True)
class Site:
    """One thing to compress.

    Attributes:
      path: its key inside the block: a kernel's path, or the module's.
      stage: sites of a lower stage run earlier; those of one stage do not feed each other.
      kind: see the module's docstring.
      kernels: paths of the kernels that its rank shrinks.
      input_tap: where the input (of a module: of its last layer) is tapped.
    """

    path: str
    stage: int
    kind: str
    kernels: tuple[str, ...]
    input_tap: str

    @property
    def layer(self) -> str:
        """Path of the linear layer, which also holds the bias."""
        return self.path.removesuffix("/kernel")

    @property
    def output_tap(self) -> str:
        """Where the product without the bias is tapped."""
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
        "mlp",
        3,
        "mlp",
        (GATE, "mlp/up/kernel", "mlp/down/kernel"),
        "mlp/mlp_hidden",
    ),
)

# The last layer of a module: linear in what the module computes, so that it can be fitted again.
LAST_LAYER = {"vo": "attention/o/kernel", "mlp": "mlp/down/kernel"}


def sites_for(kinds: frozenset[str], config: Architecture) -> tuple[Site, ...]:
    """The sites of some kinds that a block has, in the order in which they run.

    A kernel that a module covers is no linear site besides.
    """
    modules = _modules(kinds, config)
    alone = _alone(modules, config) if "linear" in kinds else ()
    return tuple(sorted((*alone, *modules), key=lambda site: site.stage))


def counted_sites(kinds: frozenset[str], config: Architecture) -> dict[str, Site]:
    """`sites_for` by path, and kernels beside them as ``dense`` sites: all that ``keep`` counts."""
    sites = sites_for(kinds, config)
    if "linear" not in kinds:
        alone = _alone(sites, config)
        sites = (*sites, *(dataclasses.replace(site, kind="dense") for site in alone))
    return {site.path: site for site in sites}


def _modules(kinds: frozenset[str], config: Architecture) -> tuple[Site, ...]:
    absent = {"qk"} if config.qk_norm else set()
    return tuple(site for site in MODULE_SITES if site.kind in kinds - absent)


def _alone(modules: tuple[Site, ...], config: Architecture) -> tuple[Site, ...]:
    """Kernels that no module covers."""
    covered = {path for site in modules for path in site.kernels}
    covered |= set() if config.gated else {GATE}
    return tuple(site for site in LINEAR_SITES if site.path not in covered)


def site_path(layer: int, site: Site) -> str:
    """The site's path in the whole model."""
    return f"layer_{layer}/{site.path}"
