"""Tables ``[rows, columns]`` whose rows are read by index: embeddings of tokens and positions.

A table is one of

* an array;
* a `Rearranged` array ``[rows, columns]``: it is stored in a smaller dtype than it is read in,
  because the dtype of the embedding is that of all activations;
* a `Rearranged` `NFQuantized` ``[columns, rows]``: the weights of a row lie one behind the other.

The last two are read row by row. A tied output head multiplies with the same weights.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lordjax.kernels import normal_float
from lordjax.kernels.base import Kernel, materialize, matmul
from lordjax.kernels.layout import Layout, Rearranged, dimensions
from lordjax.kernels.quantized import NFQuantized

DTYPES = ("bfloat16", "float16", "float32")


def parse(text: str) -> normal_float.Format | str:
    """Returns the format of a table: a NormalFloat format, or the name of one of `DTYPES`.

    Raises:
      ValueError: if the text names neither.
    """
    if text in DTYPES:
        return text
    try:
        return normal_float.Format.parse(text)
    except ValueError as error:
        raise ValueError(f"{error}; or a dtype: {', '.join(DTYPES)}") from error


def quantized_table(kernel: NFQuantized, dtype: Any) -> Rearranged:
    """Returns the table ``[rows, columns]`` of a quantized matrix ``[columns, rows]``.

    Args:
      kernel: the transposed table.
      dtype: dtype of the rows that are read.
    """
    columns, rows = kernel.shape
    return Rearranged(kernel, _transposed((rows, columns)), jnp.dtype(dtype).name)


def smaller_table(table: Any, dtype: Any) -> Any:
    """Returns a table that is stored in another dtype, and read in its own.

    Args:
      table: an array ``[rows, columns]``.
      dtype: dtype of the stored array.
    """
    if table.dtype == jnp.dtype(dtype):
        return table
    outputs, inputs = dimensions(table.shape)
    layout = Layout(tuple(table.shape), (), outputs, inputs)
    return Rearranged(table.astype(dtype), layout, table.dtype.name)


def take_rows(table: Any, ids: Int[Array, "..."]) -> Float[Array, "... columns"]:
    """Returns rows of a table; only these are decoded.

    Args:
      table: an array or a kernel ``[rows, columns]``.
      ids: indices of rows. A row that is not there is NaN.

    Returns:
      The rows in the table's dtype.
    """
    if isinstance(table, Rearranged) and _is_transposed(table):
        return table.kernel.columns(ids).astype(table.dtype)
    if isinstance(table, Rearranged) and table.layout.plain:
        return take_rows(table.kernel, ids).astype(table.dtype)
    return jnp.take(materialize(table), ids, axis=0)


def scores(x: Float[Array, "... columns"], table: Any) -> Float[Array, "... rows"]:
    """Returns ``x @ table.T``, in the wider dtype of ``x`` and the table.

    Args:
      x: vectors.
      table: an array or a kernel ``[rows, columns]``.
    """
    x = x.astype(max(x.dtype, table.dtype, key=lambda dtype: dtype.itemsize))
    if isinstance(table, Rearranged) and _is_transposed(table):
        return matmul(x, table.kernel)
    return jnp.dot(x, _stored_array(table).T.astype(x.dtype))


def _stored_array(table: Any) -> Any:
    """Returns a table as an array, in the dtype in which it is stored."""
    if isinstance(table, Rearranged) and table.layout.plain:
        return materialize(table.kernel)
    return table.materialize() if isinstance(table, Kernel) else table


def _transposed(shape: tuple[int, int]) -> Layout:
    """Returns the layout of a table that is stored as the matrix ``[columns, rows]``."""
    rows, columns = dimensions(shape)
    return Layout(shape, (), columns, rows)


def _is_transposed(table: Rearranged) -> bool:
    """Returns whether a table is a quantized matrix ``[columns, rows]``."""
    layout, kernel = table.layout, table.kernel
    if not isinstance(kernel, NFQuantized) or len(layout.shape) != 2:
        return False
    return len(kernel.shape) == 2 and layout == _transposed((layout.shape[0], layout.shape[1]))
