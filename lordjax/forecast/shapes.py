"""What a compressed model would weigh and cost, from shapes alone: no weights, no data.

Ranks are given by pattern (LoRD's one rank per layer type), or by a policy that looks at shapes
only (`allocation.CURVELESS`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lordjax.allocation.candidates import Candidate
from lordjax.allocation.curves import Curve
from lordjax.allocation.plan import Plan
from lordjax.allocation.policies import CURVELESS, allocate
from lordjax.compression.site_factors import site_sizes
from lordjax.kernels import normal_float, trees
from lordjax.kernels.base import is_kernel
from lordjax.kernels.kinds import weights
from lordjax.kernels.low_rank import LowRank
from lordjax.kernels.quantized import LowRankPlusQuantized, NFQuantized
from lordjax.methods import METHODS, corrects_bias
from lordjax.models.config import ModelConfig
from lordjax.models.head_axes import narrowed
from lordjax.models.sites import Site, counted_sites, site_path, sites_for
from lordjax.models.source import InMemory
from lordjax.models.transformer import init
from lordjax.names import is_block_linear, layer_type


@functools.cache
def shapes(config: ModelConfig) -> InMemory:
    """The untouched model with float32 shapes in place of arrays."""
    # Blocks are all of one shape, and tracing 80 of them takes a minute.
    one = dataclasses.replace(config, num_layers=1, windows=None)
    tree = jax.eval_shape(lambda: init(one, jax.random.key(0)))
    block = tree.pop("layer_0")
    return InMemory(config, tree | {f"layer_{i}": block for i in range(config.num_layers)})


def stored(config: ModelConfig, leaves: Mapping[str, Any], dtype: Any = None) -> InMemory:
    """The untouched model with shapes in place of arrays, in the dtypes that are stored.

    Args:
      config: the architecture.
      leaves: parameter path -> shape and dtype.
      dtype: instead of theirs.
    """
    table = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype if dtype is None else jnp.dtype(dtype))
        for path, leaf in leaves.items()
    }
    return InMemory(config, trees.unflatten(table))


def plan_by_shapes(config: ModelConfig, method: str, keep: float, policy: str) -> Plan:
    """The plan of a policy that looks at shapes only.

    Raises:
      ValueError: if the policy looks at data, or the budget cannot be met.
    """
    if policy not in CURVELESS:
        raise ValueError(f"ranks by policy {policy!r} depend on calibration data")
    sites = counted_sites(METHODS[method].kinds, config)
    curves = {}
    for path, size in site_sizes(shapes(config), method).items():
        bias = corrects_bias(method, sites[path.split("/", 1)[1]].kind, layer_type(path))
        extra = max(size.moved, size.bias if bias else 0)
        curves[path] = Curve(size, np.zeros(math.ceil(size.limit) + 1), extra)
    return Plan(method, allocate(curves, keep, policy)[0], keep, policy)


def outline(config: ModelConfig, plan: Plan, source: InMemory | None = None) -> dict[str, Any]:
    """Shapes and dtypes of the parameters of a compressed model: nested dict, kernels included.

    Args:
      config: of the untouched model.
      plan: low ranks and widths.
      source: of shapes; None: float32.
    """
    source = source or shapes(config)
    tree = dict(source.non_block_params())
    for i in range(config.num_layers):
        block = source.block(i)
        flat = trees.flatten(block)
        for site in sites_for(METHODS[plan.method].kinds, config):
            rank = plan.ranks[site_path(i, site)]
            if rank is not None:
                new = _factored if site.kind == "linear" else _narrow
                flat = new(site, flat, rank, plan.method, config)
        tree[f"layer_{i}"] = trees.unflatten(flat)
    return tree


def _factored(
    site: Site, flat: Mapping[str, Any], rank: int, method: str, config: ModelConfig
) -> dict[str, Any]:
    del config
    (fan_in, fan_out), dtype = flat[site.path].shape, flat[site.path].dtype

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    table = {**flat, site.path: LowRank(array(fan_in, rank), array(rank, fan_out))}
    if corrects_bias(method, site.kind, site.layer):
        table[f"{site.layer}/bias"] = array(fan_out)
    return table


def _narrow(
    site: Site, flat: Mapping[str, Any], rank: int, method: str, config: ModelConfig
) -> dict[str, Any]:
    bias = corrects_bias(method, site.kind, site.layer)
    new = narrowed(site.kind, flat, rank, config, bias=bias)
    return {**flat, **{path: jax.ShapeDtypeStruct(*what) for path, what in new.items()}}


def multiplications(config: ModelConfig, tree: Any, length: int) -> int:
    """Multiplications of matrix products in a forward pass of one window of ``length`` tokens.

    Linear layers, head, and attention with its whole square, as papers count it (not half).
    """
    flat, total = trees.flatten(tree), 0
    for path, leaf in flat.items():
        tied_head = path == "embed/embedding" and config.tie_embeddings and config.head != "none"
        if path.endswith("kernel") or tied_head:
            # A classifier's head sees one token.
            once = config.head == "classes" and not is_block_linear(path)
            total += weights(leaf) * (1 if once else length)
    layers = [f"layer_{i}/attention" for i in range(config.num_layers)]
    widths = sum(flat[f"{at}/q/kernel"].shape[1] + flat[f"{at}/o/kernel"].shape[0] for at in layers)
    return total + length**2 * widths


Candidates = Mapping[str, Candidate]


def kernel_shapes(
    shape: tuple[int, ...], option: Candidate, dtype: str, factors: normal_float.Format | None
) -> Any:
    """A matrix ``[in, out]`` as an option says: shapes and dtypes."""

    def factor(*shape: int) -> Any:
        dense = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
        return dense if factors is None else _codes(shape, factors)

    (fan_in, fan_out), rank = shape, option.rank
    base = None if option.form is None else _codes(shape, option.form)
    if rank is None:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) if base is None else base
    pair = LowRank(factor(fan_in, rank), factor(rank, fan_out))
    return pair if base is None else LowRankPlusQuantized(base, pair)


def _codes(shape: tuple[int, ...], form: normal_float.Format) -> NFQuantized:
    return jax.eval_shape(
        functools.partial(NFQuantized.encode, form=form), jax.ShapeDtypeStruct(shape, jnp.float32)
    )


def quantized_pairs(tree: Any, form: normal_float.Format) -> Any:
    """Shapes of parameters with all factor pairs as codes: those of `factoring.quantize_pairs`."""

    def pair(leaf: Any) -> Any:
        if not isinstance(leaf, LowRank):
            return leaf
        return LowRank(_codes(leaf.left.shape, form), _codes(leaf.right.shape, form))

    return jax.tree.map(pair, tree, is_leaf=is_kernel)


def quantized_outline(
    config: ModelConfig,
    options: Candidates,
    source: InMemory,
    dtype: str | None,
    factors: normal_float.Format | None,
) -> dict[str, Any]:
    """Shapes and dtypes of the parameters of a quantised model: nested dict, kernels included.

    Args:
      config: of the untouched model.
      options: site path -> what the matrix becomes.
      source: of shapes as they are stored.
      dtype: of what is no code; None: float16 for the blocks' matrices, the rest as it is.
      factors: format of products' factors; None: as other matrices.
    """

    def stored(a: Any) -> Any:
        floating = dtype is not None and jnp.issubdtype(a.dtype, jnp.floating)
        return jax.ShapeDtypeStruct(a.shape, jnp.dtype(dtype)) if floating else a

    tree = jax.tree.map(stored, dict(source.non_block_params()))
    for i in range(config.num_layers):
        flat = trees.flatten(jax.tree.map(stored, source.block(i)))
        for path in flat:
            option = options.get(f"layer_{i}/{path}")
            if option is not None:
                flat[path] = kernel_shapes(flat[path].shape, option, dtype or "float16", factors)
        tree[f"layer_{i}"] = trees.unflatten(flat)
    return tree
