"""Compression of a function on several devices: the same statistics and plan as on one.

Run by `test_devices` in a process of its own, which has 8 emulated devices. Prints what differs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from plain import loss, scanned, tokens, transposed

from lordjax import collect, compress_params, compressed, materialize
from lordjax.kernels import trees
from lordjax.runtime.mesh import make_mesh

BATCHES = [tokens(0, 8), tokens(1, 8)]
LAYOUTS = {  # of matrices [in, out], of other parameters
    "fsdp": lambda leaf: P(*[None] * (leaf.ndim - 2), "data"),
    "tensor": lambda leaf: P(*[None] * (leaf.ndim - 1), "data"),
}


def sharded(params, mesh, layout):
    """Parameters split over a mesh where their sizes allow."""

    def put(leaf):
        spec = layout(leaf) if leaf.ndim > 1 else P()
        sizes = [mesh.shape[name] if name else 1 for name in spec]
        even = all(n % size == 0 for n, size in zip(leaf.shape, sizes, strict=False))
        return jax.device_put(leaf, NamedSharding(mesh, spec if even else P()))

    return jax.tree.map(put, params)


def same(found, wanted, what):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a, float), np.asarray(b, float)
        worst = np.abs(a - b).max() / max(1.0, np.abs(b).max())
        assert worst < 1e-5, (what, worst)


@functools.cache
def on_one(make):
    """A model and its statistics on one device."""
    model = make()
    return model, collect(model.apply, model.params, BATCHES, loss=loss)


def check(make, count, layout):
    """Compares statistics, plans and outputs on some devices with those on one."""
    model, wanted = on_one(make)
    name = f"{make.__name__} on {count} devices, {layout}"
    mesh = make_mesh({"data": count})
    params = sharded(model.params, mesh, LAYOUTS[layout])
    batches = [jax.device_put(ids, NamedSharding(mesh, P("data"))) for ids in BATCHES]
    stats = collect(model.apply, params, batches, loss=loss)
    same(stats.folds, wanted.folds, name)
    for method, budget in (("modegpt", {"keep": 0.6}), ("svd-llm", {"keep": 0.5})):
        small, plan = compress_params(params, stats, method=method, **budget)
        one, other = compress_params(model.params, wanted, method=method, **budget)
        assert plan.ranks == other.ranks, (name, method)
        if method == "svd-llm":
            same(materialize(small), materialize(one), name)
        flat = trees.flatten(small)
        for path, leaf in flat.items():
            for array in jax.tree.leaves(leaf):
                assert len(array.sharding.device_set) == count, (name, path)
        found = jax.jit(compressed(model.apply))(small, batches[0])
        same(found, compressed(model.apply)(small, batches[0]), name)
    left = small["blocks"]["up"].left if make is scanned else None
    if left is not None and count > 1:
        axis = left.sharding.spec
        assert ("data" in axis) == (layout == "fsdp"), axis


def mapped(make):
    """Compares a compressed function under ``pmap`` and ``shard_map`` with the function itself."""
    model, stats = on_one(make)
    small, _ = compress_params(model.params, stats, method="svd-llm", keep=0.5)
    fast = compressed(model.apply)
    wanted = fast(small, BATCHES[0])
    found = jax.pmap(fast, in_axes=(None, 0))(small, BATCHES[0].reshape(8, 1, -1))
    same(found.reshape(wanted.shape), wanted, "pmap")
    mesh = make_mesh({"data": 8})
    run = jax.shard_map(fast, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))
    same(jax.jit(run)(small, BATCHES[0]), wanted, "shard_map")


if __name__ == "__main__":
    jax.config.update("jax_default_matmul_precision", "highest")
    for make in (scanned, transposed):
        mapped(make)
    for count, layout in ((1, "fsdp"), (4, "tensor"), (8, "fsdp")):
        check(scanned, count, layout)
    check(transposed, 4, "tensor")
    print(f"functions on {jax.device_count()} devices", jnp.ones(()))
