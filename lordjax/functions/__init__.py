"""Compresses any JAX function: its products with parameters are found in its jaxpr.

::

    find_sites(apply, params, batch)          -> Sites        which leaves are matrices, and why not
    collect(apply, params, batches, loss=...) -> Statistics   one jitted pass per batch
    compress_params(params, stats, keep=0.7)  -> tree, Plan   leaves become kernels
    compressed(apply)                         -> function     takes such trees, or arrays

`equations.views` follows parameters through transposes and reshapes, `equations.interpreter` runs
the equations of a function with something else in place of its products, and `finding`, `observing`
and `running` say what.
"""
