"""What can be compressed in a block: a linear layer alone, or layers that share an inner width.

A *site* is one entry of a plan. Its kind says which mathematics applies:

* ``linear``  one kernel ``[in, out]``; the rank of a factor pair;
* ``qk``      queries and keys; the width of a head in the product ``q @ k.T``;
* ``vo``      values and the output projection; the width of a head's value;
* ``mlp``     up (and gate) and down; the width inside.

The last three are *modules*: compressed, they are the same layers, only narrower.
"""

from __future__ import annotations

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Site:
    """One thing to compress.

    Attributes:
      path: its key inside the block: a kernel's path, or the module's.
      group: sites of a lower group run earlier; those of one group do not feed each other.
      kind: see the module's docstring.
      kernels: paths of the kernels that its rank shrinks.
      input_tap: where the input (of a module: of its last layer) is tapped.
    """

    path: str
    group: int
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


def _linear(path: str, input_tap: str, group: int) -> Site:
    return Site(path, group, "linear", (path,), input_tap)


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


def sites_for(kinds: frozenset[str], gated: bool = True) -> tuple[Site, ...]:
    """The sites of some kinds, in the order in which they run; ``gated``: the MLP has a gate.

    A kernel that a module covers is no linear site besides.
    """
    modules = tuple(site for site in MODULE_SITES if site.kind in kinds)
    covered = {path for site in modules for path in site.kernels}
    covered |= set() if gated else {GATE}
    linear = () if "linear" not in kinds else LINEAR_SITES
    alone = tuple(site for site in linear if site.path not in covered)
    return tuple(sorted((*alone, *modules), key=lambda site: site.group))


def site_path(layer: int, site: Site) -> str:
    """The site's path in the whole model."""
    return f"layer_{layer}/{site.path}"


def layer_type(path: str) -> str:
    """``layer_7/mlp/up/kernel`` -> ``mlp/up``: the same layer in every block."""
    return path.split("/", 1)[1].removesuffix("/kernel")


def layer_index(path: str) -> int:
    """``layer_12/mlp/up/kernel`` -> 12."""
    return int(path.split("/", 1)[0].removeprefix("layer_"))


def is_block_linear(path: str) -> bool:
    """Whether a parameter counts for a budget: the kernel of a linear layer of a block."""
    return re.fullmatch(r"layer_\d+/.*/kernel", path) is not None
