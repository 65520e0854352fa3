"""Statistics of the tables outside the blocks: what an error of a row costs in the loss.

Head: an error ``e_v`` of row v changes logit v by ``e_vᵀ h``, h being the head's input. To second
order the loss rises by half of ``eᵀ (diag p - p pᵀ) e`` over the changes of the logits. Errors of
rows are independent, so that leaves ``Σ_v p_v (1 - p_v) (e_vᵀ h)²``, whatever the token was.

Embeddings: an error of row v moves the stream wherever token v stands, and the loss by its
gradient there: half of ``Σ_t (e_vᵀ g_t)²`` over these positions.

Both sums are approximated by ``Σ_v c_v e_vᵀ M e_v``, each factor weighted by the other's energy, as
for the matrices of the blocks (`weightings`). A tied table has the sum of both.

Rows that the calibration never shows get the share of all weight that singletons have, which is
Good and Turing's estimate for unseen tokens.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lordjax.calibration.statistics import MeanSquare, SecondMoment
from lordjax.kernels import trees
from lordjax.models.config import ModelConfig
from lordjax.models.layers import PERTURBATIONS, TAPS
from lordjax.models.objective import CHUNK
from lordjax.models.tables import EMBED, HEAD, POSITIONS, predicts_tokens, table_paths
from lordjax.models.transformer import HEAD_INPUT, Transformer, default_positions

LEAST_UNSEEN = 0.5  # occurrences that unseen rows share, at least

Sums = dict[str, "TableSums"]  # path of a table -> its sums; those of a tied head are at `HEAD`


@flax.struct.dataclass
class TableSums:
    """Sums over calibration positions.

    Attributes:
      count: ``[]``, number of positions.
      total: ``[columns, columns]``, Σ of the vectors that errors of rows are multiplied with, each
        weighted by the curvature of the loss.
      rows: ``[rows]``, the same energy by row; of an embedding the number of occurrences.
    """

    count: Any
    total: Any
    rows: Any

    @classmethod
    def zeros(cls, rows: int, columns: int) -> TableSums:
        """Returns the sums over no positions."""
        return cls(jnp.zeros(()), jnp.zeros((columns, columns)), jnp.zeros(rows))

    def add(self, count: Any, vectors: Float[Array, "t columns"], rows: Any) -> TableSums:
        """Adds positions; ``vectors`` are multiplied by the root of their weight already."""
        gram = jnp.matmul(vectors.T, vectors, precision="highest")
        return TableSums(self.count + count, self.total + gram, self.rows + rows)


class Ends:
    """Sums at both ends of the model, which `backward_pass` adds batches to.

    Args:
      config: the architecture.
      non_block_params: parameters outside the blocks, or their shapes.
    """

    def __init__(self, config: ModelConfig, non_block_params: Any):
        self.config = config
        flat = trees.flatten(non_block_params)
        shapes = {path: flat[path].shape for path in table_paths(config)}
        self.head: Sums = {}
        if HEAD in shapes:
            self.head[HEAD] = TableSums.zeros(*shapes[HEAD][::-1])
        elif predicts_tokens(config):
            self.head[HEAD] = TableSums.zeros(*shapes[EMBED])
        embeddings = [path for path in (EMBED, POSITIONS) if path in shapes]
        self.embeddings: Sums = {path: TableSums.zeros(*shapes[path]) for path in embeddings}

    def last(self, non_block_params: Any, x: Any, goals: Any) -> None:
        """Adds a batch of residual streams after the last block, and its targets."""
        if self.head:
            self.head = _add_head(non_block_params, x, goals, self.head, config=self.config)

    def first(self, non_block_params: Any, tokens: Any, mask: Any, gradient: Any) -> None:
        """Adds a batch of tokens, and the gradient by the residual stream before block 0."""
        given = non_block_params, tokens, mask, gradient, self.embeddings
        self.embeddings = _add_embeddings(*given, config=self.config)

    def statistics(self) -> dict[str, dict[str, Any]]:
        """Returns path of a table -> ``weighted_inputs`` and ``weighted_squares``.

        `make_weights` reads them as it does those of a matrix in a block.
        """
        seen = {path: np.asarray(sums.rows) for path, sums in self.embeddings.items()}
        found: dict[str, TableSums] = {}
        for path, sums in self.embeddings.items():
            energy = jnp.trace(sums.total) / jnp.maximum(jnp.sum(sums.rows), 1)
            found[path] = sums.replace(rows=_with_unseen(sums.rows * energy, seen[path]))
        for sums in self.head.values():
            path = HEAD if HEAD in table_paths(self.config) else EMBED
            head = sums.replace(rows=_with_unseen(sums.rows, seen[EMBED]))
            found[path] = _sum(found[path], head) if path in found else head
        return {
            path: {
                "weighted_inputs": SecondMoment(sums.count, sums.total),
                "weighted_squares": MeanSquare(sums.count, sums.rows),
            }
            for path, sums in found.items()
        }


def _sum(first: TableSums, second: TableSums) -> TableSums:
    """Returns the sums of two uses of one table."""
    total, rows = first.total + second.total, first.rows + second.rows
    return TableSums(jnp.maximum(first.count, second.count), total, rows)


def _with_unseen(rows: Float[Array, "rows"], seen: np.ndarray) -> Float[Array, "rows"]:
    """Moves a share of all weight to the rows that were never seen.

    Args:
      rows: weight of every row.
      seen: how often each row was seen.

    Source: Good (1953).
    """
    never, count = seen == 0, float(seen.sum())
    if not never.any() or not count:
        return rows
    share = min(max(float((seen == 1).sum()), LEAST_UNSEEN), count / 2) / count
    return rows * (1 - share) + jnp.where(never, share * jnp.sum(rows) / float(never.sum()), 0)


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("sums",))
def _add_head(
    non_block_params: Any,
    x: Float[Array, "b s m"],
    goals: Int[Array, "b s"],
    sums: Sums,
    *,
    config: ModelConfig,
) -> Sums:
    """Adds positions with a target to the sums of the head, `CHUNK` positions at a time."""
    model = Transformer(config)
    rows, valid = x.reshape(-1, x.shape[-1]), goals.reshape(-1) >= 0
    fill = -len(rows) % CHUNK
    rows = jnp.pad(rows, ((0, fill), (0, 0))).reshape(-1, 1, CHUNK, rows.shape[-1])
    valid = jnp.pad(valid, (0, fill)).reshape(-1, CHUNK)

    def add(total: TableSums, each: tuple[Array, Array]) -> tuple[TableSums, None]:
        x, there = each
        logits, state = model.apply(
            {"params": non_block_params}, x, method=Transformer.unembed, mutable=[TAPS]
        )
        inputs = state[TAPS][HEAD_INPUT].astype(jnp.float32).reshape(CHUNK, -1)
        curvature = jnp.where(there[:, None], _curvature(logits[0], config), 0)
        squares = jnp.sum(inputs**2, axis=1)
        weighted = inputs * jnp.sqrt(jnp.sum(curvature, axis=1))[:, None]
        energies = jnp.matmul(squares[None], curvature, precision="highest")[0]
        return total.add(jnp.sum(there.astype(jnp.float32)), weighted, energies), None

    return {HEAD: jax.lax.scan(add, sums[HEAD], (rows, valid))[0]}


def _curvature(logits: Float[Array, "t v"], config: ModelConfig) -> Float[Array, "t v"]:
    """Returns the second derivative of the loss by each product with a row of the head."""
    chances = jax.nn.softmax(logits)
    slope = config.logit_scale
    if config.final_softcap is not None:
        slope = slope * (1 - (logits / config.final_softcap) ** 2)
    return chances * (1 - chances) * slope**2


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("sums",))
def _add_embeddings(
    non_block_params: Any,
    tokens: Int[Array, "b s"],
    mask: Bool[Array, "b s"] | None,
    gradient: Float[Array, "b s m"],
    sums: Sums,
    *,
    config: ModelConfig,
) -> Sums:
    """Adds a batch to the sums of the embeddings."""
    positions = jnp.broadcast_to(default_positions(tokens, mask), tokens.shape)

    def run(added: Any) -> tuple[Array, Any]:
        return Transformer(config).apply(
            {"params": non_block_params, PERTURBATIONS: added},
            *(tokens, mask, None, positions),
            method=Transformer.embed_tokens,
            mutable=[TAPS],
        )

    names = {path: path.split("/")[0] for path in sums}
    taps = jax.eval_shape(run, {})[1][TAPS]
    outs = {name: taps[name]["out"] for name in names.values()}
    zero = {name: {"out": jnp.zeros(out.shape, out.dtype)} for name, out in outs.items()}
    _, pull, state = jax.vjp(run, zero, has_aux=True)
    (gradients,) = pull(gradient.astype(outs[names[EMBED]].dtype))
    there = jnp.ones(tokens.shape) if mask is None else mask.astype(jnp.float32)
    new = {}
    for path, name in names.items():
        vectors = gradients[name]["out"].astype(jnp.float32)
        vectors = jnp.where(there[..., None] > 0, vectors, 0).reshape(-1, vectors.shape[-1])
        ids = state[TAPS][name]["ids"].reshape(-1)
        seen = jnp.zeros_like(sums[path].rows).at[ids].add(there.reshape(-1))
        new[path] = sums[path].add(jnp.sum(there), vectors, seen)
    return new
