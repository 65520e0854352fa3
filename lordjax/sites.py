"""What can be compressed in a block: which kernel, fed by which tap, in which order it runs."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Site:
    """One linear layer of a block.

    Attributes:
      path: the kernel's path inside the block.
      input_tap: where its input is tapped (`models.transformer`), shared inside a group.
      group: layers with one input; groups are numbered in the order in which they run.
    """

    path: str
    input_tap: str
    group: int

    @property
    def layer(self) -> str:
        """Path of the linear layer, which also holds the bias."""
        return self.path.removesuffix("/kernel")

    @property
    def output_tap(self) -> str:
        """Where the product without the bias is tapped."""
        return f"{self.layer}/out"


LINEAR_SITES: tuple[Site, ...] = (
    Site("attention/q/kernel", "attention/attention_in", 0),
    Site("attention/k/kernel", "attention/attention_in", 0),
    Site("attention/v/kernel", "attention/attention_in", 0),
    Site("attention/o/kernel", "attention/attention_out", 1),
    Site("mlp/gate/kernel", "mlp/mlp_in", 2),
    Site("mlp/up/kernel", "mlp/mlp_in", 2),
    Site("mlp/down/kernel", "mlp/mlp_hidden", 3),
)


def site_path(layer: int, site: Site) -> str:
    """The kernel's path in the whole model."""
    return f"layer_{layer}/{site.path}"


def layer_type(path: str) -> str:
    """``layer_7/mlp/up/kernel`` -> ``mlp/up``: the same layer in every block."""
    return path.split("/", 1)[1].removesuffix("/kernel")


def layer_index(path: str) -> int:
    """``layer_12/mlp/up/kernel`` -> 12."""
    return int(path.split("/", 1)[0].removeprefix("layer_"))
