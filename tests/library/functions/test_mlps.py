"""MLPs that are found by data flow, pruned and refitted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain import HIDDEN, LAYERS, MODELS, WIDTH, loss, normal, scanned, transposed

from lordjax import Plan, collect, compress_params, compressed, find_sites, materialize
from lordjax.compression.site_factors import factor_site
from lordjax.kernels.base import is_kernel
from lordjax.kernels.layout import Rearranged
from lordjax.kernels.pruned import Pruned
from lordjax.methods import METHODS
from lordjax.models.sites import Site


def modules(name):
    model = MODELS[name]()
    return find_sites(model.apply, model.params, model.batches[0])


def test_gated_and_plain_mlps_are_found():
    found = modules("unrolled").modules
    assert [module.name for module in found] == [f"blocks/{i}" for i in range(LAYERS)]
    assert found[0].ups == ("blocks/0/gate", "blocks/0/up") and found[0].width == HIDDEN
    assert found[0].down == "blocks/0/down" and found[0].biases == ()
    found = modules("transposed").modules
    assert found[1].ups == ("blocks/1/fc1/kernel",) and found[1].down == "blocks/1/fc2/kernel"
    assert found[1].biases == ("blocks/1/fc1/bias",)


@pytest.mark.quick("scanned")
@pytest.mark.parametrize("name", ["scanned", "rematerialized", "dispatched"])
def test_mlps_in_loops_and_of_experts_are_stacks(name):
    (module,) = modules(name).modules
    assert module.width == HIDDEN and module.down.endswith("down")


def spoiled(change):
    """The table of an MLP in which something else uses the neurons."""
    params = {
        "up": normal(0, WIDTH, HIDDEN),
        "bias": jnp.zeros(HIDDEN),
        "down": normal(1, HIDDEN, WIDTH),
        "other": normal(2, HIDDEN, 4),
        "scale": jnp.ones(HIDDEN),
    }
    x = normal(3, 5, WIDTH)
    return find_sites(change, params, x)


def hidden(p, x):
    return jax.nn.gelu(x @ p["up"] + p["bias"][None])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda p, x: (h := hidden(p, x)) @ p["down"] + h.mean(), "reduce_sum uses the outputs of"),
        (lambda p, x: jax.nn.softmax(hidden(p, x)) @ p["down"], "reduce_max uses the outputs of"),
        (
            lambda p, x: hidden(p, x).reshape(5, 6, 4).reshape(5, HIDDEN) @ p["down"],
            "reshape uses its outputs",
        ),
        (
            lambda p, x: ((h := hidden(p, x)) @ p["down"], h @ p["other"]),
            "inputs of several products",
        ),
        (lambda p, x: ((h := hidden(p, x)) @ p["down"], h), "output of the function uses"),
        (
            lambda p, x: (hidden(p, x) * jnp.arange(1.0 * HIDDEN)[None]) @ p["down"],
            "mul uses its outputs",
        ),
        (lambda p, x: hidden(p, x)[:, ::-1] @ p["down"], "rev uses its outputs"),
        (lambda p, x: hidden(p, hidden(p, x) @ p["down"]) @ p["down"], "is used 2 times"),
    ],
    ids=["sum", "norm", "reshape", "consumer", "output", "numbers", "order", "twice"],
)
def test_other_uses_make_it_no_module(change, reason):
    found = spoiled(change)
    assert found.modules == () and reason in " ".join(found.refused.values())
    assert reason in str(found)


def test_constants_and_vectors_along_the_neurons_are_allowed():
    def apply(p, x):
        h = hidden(p, x) * p["scale"][None]
        return jnp.where(h > 0, h, 0.1 * h) @ p["down"]

    (module,) = spoiled(apply).modules
    assert set(module.biases) == {"bias", "scale"}


def whole(table, name, method, folds):
    """A plan that keeps all sites dense but one."""
    paths = dict.fromkeys(table.names())
    for module in table.modules:
        for path in (*module.ups, module.down):
            del paths[path]
        paths[module.name] = None
    return Plan(method, paths | {name: folds}, None, "given")


@pytest.mark.full
@pytest.mark.parametrize(
    "name", ["unrolled", "transposed", "scanned", "rematerialized", "dispatched"]
)
def test_pruned_functions_are_the_zero_padded_ones(name):
    model = MODELS[name]()
    stats = collect(model.apply, model.params, model.batches, loss=loss)
    small, plan = compress_params(model.params, stats, method="modegpt", keep=0.75)
    pruned = [module for module in stats.sites.modules if plan.ranks[module.name] is not None]
    if not pruned:
        plan = whole(stats.sites, stats.sites.modules[0].name, "modegpt", 10)
        small, _ = compress_params(model.params, stats, plan=plan)
    leaves = jax.tree.leaves(small, is_leaf=is_kernel)
    inner = [leaf.kernel if isinstance(leaf, Rearranged) else leaf for leaf in leaves]
    assert any(isinstance(leaf, Pruned) for leaf in inner)
    fast, ids = jax.jit(compressed(model.apply)), model.batches[0]
    wanted = model.apply(materialize(small), ids)
    np.testing.assert_allclose(fast(small, ids), wanted, atol=2e-5)
    value = lambda tree: loss(fast(tree, ids), ids).sum()  # noqa: E731
    for leaf in jax.tree.leaves(jax.grad(value)(small)):
        assert np.isfinite(leaf).all()


@pytest.mark.full
def test_the_refit_is_that_of_the_method():
    model = transposed()
    stats = collect(model.apply, model.params, model.batches, loss=loss)
    plan = whole(stats.sites, "blocks/0", "modegpt", 9)
    small, _ = compress_params(model.params, stats, plan=plan)
    parts = [fold["blocks/0/fc2/kernel"] for fold in stats.folds]
    read = {"moments": parts[0]["input"].merge(parts[1]["input"])}
    total = jax.tree.map(lambda a, b: a + b, parts[0]["gradients"], parts[1]["gradients"])
    kernels = {"down": model.params["blocks"][0]["fc2"]["kernel"].T}
    site = Site("blocks/0", 0, "mlp", (), "")
    factors = factor_site("modegpt", site, "mlp", kernels, read | {"gradients": total})
    wanted = METHODS["modegpt"].modules["mlp"].prune(kernels, factors, 9)
    found = small["blocks"][0]["fc2"]["kernel"]
    assert found.kernel.kernel.shape == (9, WIDTH)
    np.testing.assert_allclose(found.kernel.kernel, wanted["down"], atol=1e-5)
    order = np.asarray(factors.parts["order"])[:9]
    bias = small["blocks"][0]["fc1"]["bias"].kernel.kernel
    np.testing.assert_array_equal(bias[0], model.params["blocks"][0]["fc1"]["bias"][order])


@pytest.mark.full
def test_narrow_products_run():
    model = scanned()
    stats = collect(model.apply, model.params, model.batches, loss=loss)
    plan = whole(stats.sites, "blocks", "modegpt", 7)
    small, _ = compress_params(model.params, stats, plan=plan)
    text = str(jax.make_jaxpr(compressed(model.apply))(small, model.batches[0])).replace(" ", "")
    assert "16,7" in text and "2,6,7" in text and "2,6,24" not in text


def test_a_function_that_uses_pruned_neurons_refuses_them():
    params = {"up": normal(0, WIDTH, HIDDEN), "down": normal(1, HIDDEN, WIDTH)}
    x = normal(3, 50, WIDTH)
    apply = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"]  # noqa: E731
    stats = collect(apply, params, [x], loss=lambda out, x: (out**2).sum(-1))
    small, _ = compress_params(params, stats, method="modegpt", keep=0.5)
    other = lambda p, x: jax.nn.softmax(x @ p["up"]) @ p["down"]  # noqa: E731
    with pytest.raises(ValueError, match="up: was pruned, but reduce_max uses its neurons"):
        compressed(other)(small, x)
