"""Shapes, sizes and multiplications of a compressed model, without weights and without data.

Ranks come from patterns (as in LoRD: one rank per layer type), or from a policy that reads shapes
only (`CURVELESS`).
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
from lordjax.kernels.table import parse, quantized_table, smaller_table
from lordjax.methods import METHODS, corrects_bias
from lordjax.models.config import ModelConfig
from lordjax.models.head_axes import narrowed
from lordjax.models.sites import Site, counted_sites, site_path, sites_for
from lordjax.models.source import InMemory
from lordjax.models.tables import HEAD
from lordjax.models.transformer import init
from lordjax.names import is_block_linear, layer, layer_type

Candidates = Mapping[str, Candidate]  # site path -> what the matrix becomes


@functools.cache
def dense_shapes(config: ModelConfig) -> InMemory:
    """Returns the dense model with float32 shapes in place of arrays."""
    # All blocks have the same shapes, and tracing 80 of them takes a minute.
    one = dataclasses.replace(config, num_layers=1, windows=None)
    tree = jax.eval_shape(lambda: init(one, jax.random.key(0)))
    block = tree.pop("layer_0")
    return InMemory(config, tree | {layer(i): block for i in range(config.num_layers)})


def stored(config: ModelConfig, leaves: Mapping[str, Any], dtype: Any = None) -> InMemory:
    """Returns the dense model with shapes in place of arrays, in the dtypes that are stored.

    Args:
      config: architecture of the model.
      leaves: parameter path -> anything with a shape and a dtype.
      dtype: dtype of all parameters; None: the dtypes of ``leaves``.
    """
    table = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype if dtype is None else jnp.dtype(dtype))
        for path, leaf in leaves.items()
    }
    return InMemory(config, trees.unflatten(table))


def plan_by_shapes(config: ModelConfig, method: str, keep: float, policy: str) -> Plan:
    """Returns the plan of a policy that reads shapes only.

    Args:
      config: architecture of the model.
      method: a key of `METHODS`.
      keep: fraction of the block linear weights that is kept.
      policy: a policy of `CURVELESS`.

    Raises:
      ValueError: if the policy reads calibration data, or the budget cannot be met.
    """
    if policy not in CURVELESS:
        raise ValueError(
            f"ranks of policy {policy!r} depend on calibration data; expected a policy that reads "
            f"shapes only: {', '.join(sorted(CURVELESS))}"
        )
    sites = counted_sites(METHODS[method].kinds, config)
    curves = {}
    for path, size in site_sizes(dense_shapes(config), method).items():
        bias = corrects_bias(method, sites[path.split("/", 1)[1]].kind, layer_type(path))
        extra = max(size.moved, size.bias if bias else 0)
        curves[path] = Curve(size, np.zeros(math.ceil(size.limit) + 1), extra)
    return Plan(method, allocate(curves, keep, policy)[0], keep, policy)


def outline(config: ModelConfig, plan: Plan, source: InMemory | None = None) -> dict[str, Any]:
    """Returns the parameters of a compressed model as shapes: a nested dict with kernels.

    Args:
      config: architecture of the dense model.
      plan: rank of every site; for modules the width that is kept.
      source: shapes of the dense model; None: float32.
    """
    source = source or dense_shapes(config)
    tree = dict(source.non_block_params())
    for i in range(config.num_layers):
        block = source.block(i)
        flat = trees.flatten(block)
        for site in sites_for(METHODS[plan.method].kinds, config):
            rank = plan.ranks[site_path(i, site)]
            if rank is None:
                continue
            if site.kind == "linear":
                flat = _factorized(site, flat, rank, plan.method)
            else:
                flat = _pruned(site, flat, rank, plan.method, config)
        tree[layer(i)] = trees.unflatten(flat)
    return tree


def _factorized(site: Site, flat: Mapping[str, Any], rank: int, method: str) -> dict[str, Any]:
    """Parameters of a block after one matrix became a low-rank pair."""
    (fan_in, fan_out), dtype = flat[site.path].shape, flat[site.path].dtype

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    table = {**flat, site.path: LowRank(array(fan_in, rank), array(rank, fan_out))}
    if corrects_bias(method, site.kind, site.layer):
        table[f"{site.layer}/bias"] = array(fan_out)
    return table


def _pruned(
    site: Site, flat: Mapping[str, Any], rank: int, method: str, config: ModelConfig
) -> dict[str, Any]:
    """Parameters of a block after one module was pruned to a smaller width."""
    bias = corrects_bias(method, site.kind, site.layer)
    new = narrowed(site.kind, flat, rank, config, bias=bias)
    return {**flat, **{path: jax.ShapeDtypeStruct(*what) for path, what in new.items()}}


def multiplications(config: ModelConfig, tree: Any, length: int) -> int:
    """Counts the multiplications of all matrix products in a forward pass of one sequence.

    Counts linear layers, the head, and attention with its full square, as papers do (causal models
    need half of the square).

    Args:
      config: architecture of the model.
      tree: parameters, or their shapes.
      length: tokens of the sequence.
    """
    flat, total = trees.flatten(tree), 0
    for path, leaf in flat.items():
        tied_head = path == "embed/embedding" and config.tie_embeddings and config.head != "none"
        if path.endswith("kernel") or tied_head:
            # The head of a classifier reads one token.
            reads_one = config.head == "classes" and not is_block_linear(path)
            total += weights(leaf) * (1 if reads_one else length)
    layers = [f"{layer(i)}/attention" for i in range(config.num_layers)]
    widths = sum(flat[f"{at}/q/kernel"].shape[1] + flat[f"{at}/o/kernel"].shape[0] for at in layers)
    return total + length**2 * widths


def kernel_shapes(
    shape: tuple[int, ...], candidate: Candidate, dtype: str, factors: normal_float.Format | None
) -> Any:
    """Returns the kernel that a matrix becomes, with shapes in place of arrays.

    Args:
      shape: ``[in, out]`` of the matrix.
      candidate: format and rank.
      dtype: dtype of arrays that are not quantized.
      factors: format of the low-rank factors; None: they are stored in ``dtype``.
    """

    def factor(*shape: int) -> Any:
        dense = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
        return dense if factors is None else _quantized(shape, factors)

    (fan_in, fan_out), rank = shape, candidate.rank
    base = None if candidate.form is None else _quantized(shape, candidate.form)
    if rank is None:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) if base is None else base
    pair = LowRank(factor(fan_in, rank), factor(rank, fan_out))
    return pair if base is None else LowRankPlusQuantized(base, pair)


def _quantized(shape: tuple[int, ...], form: normal_float.Format) -> NFQuantized:
    return jax.eval_shape(
        functools.partial(NFQuantized.encode, form=form), jax.ShapeDtypeStruct(shape, jnp.float32)
    )


def stored_tables(tree: Any, forms: Mapping[str, str]) -> Any:
    """Returns parameters, as shapes, with tables in some formats.

    The counterpart on arrays is `lordjax.compression.whole_file.tables.Tables.stored`.

    Args:
      tree: parameters as shapes.
      forms: path of a table -> its format (`kernels.table.parse`).
    """

    def store(path: str, leaf: Any) -> Any:
        form = parse(forms[path])
        if isinstance(form, str) and path == HEAD:
            return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(form))
        if isinstance(form, str):
            return jax.eval_shape(functools.partial(smaller_table, dtype=form), leaf)
        kernel = _quantized(leaf.shape if path == HEAD else leaf.shape[::-1], form)
        return kernel if path == HEAD else quantized_table(kernel, leaf.dtype)

    flat = trees.flatten(tree)
    return trees.update(tree, {path: store(path, flat[path]) for path in forms})


def quantized_pairs(tree: Any, form: normal_float.Format) -> Any:
    """Returns parameters, as shapes, with the factors of all low-rank pairs quantized.

    The counterpart on arrays is `lordjax.kernels.convert.quantize_pairs`.

    Args:
      tree: parameters as shapes.
      form: format of the factors.
    """

    def quantize(leaf: Any) -> Any:
        if not isinstance(leaf, LowRank):
            return leaf
        return LowRank(_quantized(leaf.left.shape, form), _quantized(leaf.right.shape, form))

    return jax.tree.map(quantize, tree, is_leaf=is_kernel)


def quantized_outline(
    config: ModelConfig,
    candidates: Candidates,
    source: InMemory,
    dtype: str | None,
    factors: normal_float.Format | None,
) -> dict[str, Any]:
    """Returns the parameters of a quantized model as shapes: a nested dict with kernels.

    Args:
      config: architecture of the dense model.
      candidates: site path -> what the matrix becomes.
      source: shapes of the dense model, in the dtypes that are stored.
      dtype: dtype of arrays that are not quantized; None: float16 in the matrices of the blocks,
        and the dtypes of ``source`` elsewhere.
      factors: format of the low-rank factors; None: they are stored in ``dtype``.
    """

    def cast(a: Any) -> Any:
        floating = dtype is not None and jnp.issubdtype(a.dtype, jnp.floating)
        return jax.ShapeDtypeStruct(a.shape, jnp.dtype(dtype)) if floating else a

    tree = jax.tree.map(cast, dict(source.non_block_params()))
    for i in range(config.num_layers):
        flat = trees.flatten(jax.tree.map(cast, source.block(i)))
        for path in flat:
            candidate = candidates.get(f"{layer(i)}/{path}")
            if candidate is not None:
                flat[path] = kernel_shapes(flat[path].shape, candidate, dtype or "float16", factors)
        tree[layer(i)] = trees.unflatten(flat)
    return tree
