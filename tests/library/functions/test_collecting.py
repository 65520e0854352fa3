"""`collect`: statistics of the inputs and gradients of a function's products."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain import LAYERS, MODELS, Model, attend, block, loss, norm, scanned, transposed, unrolled

from lordjax import collect, find_sites
from lordjax.calibration.backward_pass import gradient_basis
from lordjax.functions.collecting import Collection
from lordjax.functions.equations.tracing import open_call
from lordjax.functions.observing import observe
from lordjax.functions.site_statistics import needs_of, statistics_of, token_weights
from lordjax.functions.statistics import checksums
from lordjax.kernels import trees


def gate_inputs(params, ids):
    """The inputs of the first block's gate."""
    p, x = params["blocks"][0], params["embed"][ids]
    h = norm(x, p["norm"])
    q, k, v = (jnp.einsum("bsm,mhd->bshd", h, p[name]) for name in ("q", "k", "v"))
    return norm(x + jnp.einsum("bshd,hdm->bsm", attend(q, k, v), p["o"]), p["norm"])


def with_zeros(params, ids, zeros):
    """The loss with zeros added at the outputs of the first block's up and down projection."""
    p, x = params["blocks"][0], params["embed"][ids]
    h = gate_inputs(params, ids)
    x = block(p | {"down": jnp.zeros_like(p["down"])}, x)
    up = h @ p["up"] + zeros["up"]
    x = x + (jax.nn.silu(h @ p["gate"]) * up) @ p["down"] + zeros["down"]
    for p in params["blocks"][1:]:
        x = block(p, x)
    return loss(x @ params["head"], ids).sum()


def rows(a):
    return np.asarray(a, np.float64).reshape(-1, a.shape[-1])


def test_moments_are_those_of_the_inputs():
    model = unrolled()
    stats = collect(model.apply, model.params, model.batches)
    assert len(stats.folds) == 2
    for fold, ids in zip(stats.folds, model.batches, strict=True):
        x, own = rows(gate_inputs(model.params, ids)), fold["blocks/0/gate"]
        assert own["input"].count == 12
        np.testing.assert_allclose(own["input"].second_moment(), x.T @ x / 12, atol=1e-5)
        np.testing.assert_allclose(own["input"].mean, x.mean(0), atol=1e-5)
        np.testing.assert_allclose(own["abs_mean"].mean(), np.abs(x).mean(0), atol=1e-5)


@pytest.mark.full
def test_gradients_are_those_at_the_outputs():
    model = unrolled()
    stats = collect(model.apply, model.params, model.batches[:1], loss=loss)
    (fold,) = stats.folds
    ids, p = model.batches[0], model.params["blocks"][0]
    zeros = {"up": jnp.zeros((2, 6, 24)), "down": jnp.zeros((2, 6, 16))}
    g = jax.grad(functools.partial(with_zeros, model.params, ids))(zeros)
    down = rows(g["down"])
    own = fold["blocks/0/down"]
    np.testing.assert_allclose(own["gradients"].second_moment(), down.T @ down / 12, atol=1e-6)
    # Outputs of a matrix that widens are in its row space: gradients are seen through it.
    up, x, own = rows(g["up"]), rows(gate_inputs(model.params, ids)), fold["blocks/0/up"]
    basis = np.asarray(gradient_basis(p["up"]), np.float64)
    wanted = (up @ basis).T @ (up @ basis) / 12
    np.testing.assert_allclose(own["gradients"].second_moment(), wanted, atol=1e-6)
    energies = (up**2).sum(1)
    total = np.einsum("t,ti,tj->ij", energies, x, x)
    np.testing.assert_allclose(own["weighted_inputs"].total, total, rtol=1e-4, atol=1e-6)
    squares = np.einsum("t,to->o", (x**2).sum(1), up**2)
    np.testing.assert_allclose(own["weighted_squares"].total, squares, rtol=1e-4, atol=1e-6)


@pytest.mark.full
def test_fisher_information_is_that_of_sequences():
    model = unrolled()
    stats = collect(model.apply, model.params, model.batches[:1], loss=loss, method="fwsvd")
    found = stats.folds[0]["blocks/1/down"]["row_fisher"]
    wanted = 0
    for row in model.batches[0]:
        total = lambda p, row=row: loss(model.apply(p, row[None]), row[None]).sum()  # noqa: E731
        wanted += (jax.grad(total)(model.params)["blocks"][1]["down"] ** 2).sum(1)
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-6)


def flat(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


@pytest.mark.full
@pytest.mark.parametrize("name", ["scanned", "rematerialized", "indexed"])
def test_stacked_layers_have_stacked_statistics(name):
    one, stack = unrolled(), MODELS[name]()
    wanted = collect(one.apply, one.params, one.batches, loss=loss)
    found = collect(stack.apply, stack.params, stack.batches, loss=loss)
    for fold, other in zip(found.folds, wanted.folds, strict=True):
        for name in ("q", "o", "up", "down"):
            for i in range(LAYERS):
                mine = jax.tree.map(lambda a, i=i: a[i], fold[f"blocks/{name}"])
                theirs = other[f"blocks/{i}/{name}"]
                for a, b in zip(flat(mine), flat(theirs), strict=True):
                    np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4)


@pytest.mark.quick("mixed")
@pytest.mark.parametrize("name", MODELS)
def test_the_function_is_run_as_it_is(name):
    model = MODELS[name]()
    ids = model.batches[0]
    table = find_sites(model.apply, model.params, ids)
    for given in (None, loss):
        needs = needs_of(None, loss=given is not None)
        wanted = {path: statistics_of(table[path], needs, inner=False) for path in table.names()}

        def run(params, ids, wanted=wanted, given=given):
            call = open_call(params, (ids,), {}, kernels=False)
            return observe(call, model.apply, table, wanted, {}, given, None)[:2]

        if given is not None:  # in the outputs' own coordinates
            wanted = dict.fromkeys(wanted, ("weighted_inputs",))
            run = functools.partial(run, wanted=wanted)
        out, frame = jax.jit(run)(model.params, ids)
        np.testing.assert_array_equal(out, jax.jit(model.apply)(model.params, ids))
        assert set(frame) == set(table.names())


@pytest.mark.full
def test_the_axis_of_a_loop_has_its_place_in_the_stack():
    model = MODELS["crossed"]()
    stats = collect(model.apply, model.params, model.batches[:1], loss=loss)
    own = stats.folds[0]["mix"]
    assert stats.sites["mix"].stack == (2, LAYERS)
    x = model.params["embed"][model.batches[0]].reshape(-1, 2, 16)
    for expert in range(2):
        rows_ = np.asarray(x[:, expert], np.float64)
        for i in range(LAYERS):
            found = np.asarray(own["input"].scatter[expert, i], np.float64)
            mean = np.asarray(own["input"].mean[expert, i], np.float64)
            total = found + len(rows_) * np.outer(mean, mean)
            np.testing.assert_allclose(total, rows_.T @ rows_, atol=1e-4)
            rows_ = np.tanh(rows_ @ np.asarray(model.params["mix"][expert, i], np.float64))
    assert own["gradients"].total.shape == (2, LAYERS, 16, 16)


@pytest.mark.full
def test_loops_add_up_and_branches_count_once():
    model = MODELS["recurrent"]()
    stats = collect(model.apply, model.params, model.batches[:1], loss=loss)
    own = stats.folds[0]
    assert own["cell"]["input"].count == 2 * 6  # every step of the loop
    assert own["extra"]["input"].count == 2 * 6
    assert np.isfinite(own["cell"]["gradients"].total).all()


def test_while_loops_have_statistics_without_a_loss():
    def apply(params, x):
        return jax.lax.while_loop(
            lambda s: s[0] < 4, lambda s: (s[0] + 1, jnp.tanh(s[1] @ params["w"])), (0, x)
        )[1]

    x = jax.random.normal(jax.random.key(0), (5, 4))
    params = {"w": jax.random.normal(jax.random.key(1), (4, 4))}
    stats = collect(apply, params, [x])
    assert stats.folds[0]["w"]["input"].count == 20


def test_weights_leave_tokens_out():
    model = unrolled()
    ids = model.batches[0]
    mask = jnp.arange(6)[None] < jnp.array([[6], [4]])

    def apply(params, ids, mask):
        del mask
        return model.apply(params, ids)

    stats = collect(apply, model.params, [(ids, mask)], weights=lambda ids, mask: mask)
    own = stats.folds[0]["blocks/0/gate"]["input"]
    x = rows(gate_inputs(model.params, ids))[np.asarray(mask).reshape(-1)]
    assert own.count == 10 and not stats.unweighted
    np.testing.assert_allclose(own.second_moment(), x.T @ x / 10, atol=1e-5)


@pytest.mark.full
def test_weights_that_fit_no_vectors_are_told():
    model = MODELS["recurrent"]()
    stats = collect(model.apply, model.params, model.batches, weights=lambda ids: ids >= 0)
    assert stats.unweighted == ("cell", "extra")


def test_weights_find_their_axes():
    weights = jnp.arange(6.0).reshape(2, 3)
    assert token_weights(weights, (2, 3)).shape == (2, 3)
    np.testing.assert_array_equal(token_weights(weights, (6,)), jnp.arange(6.0))
    found = token_weights(weights, (2, 4, 3))
    np.testing.assert_array_equal(found[:, 1], weights)
    assert token_weights(weights, (3, 2)) is None and token_weights(None, (2, 3)) is None


@pytest.mark.full
def test_groups_of_sites_are_the_same_in_several_passes():
    model = unrolled()
    names = find_sites(model.apply, model.params, model.batches[0]).names()
    run = functools.partial(collect, model.apply, model.params, model.batches, loss=loss)
    both = run(sites=names[:5]) | run(sites=names[5:])
    wanted = run()
    assert both.checksums == wanted.checksums
    for path in names:
        for a, b in zip(flat(both.folds[1][path]), flat(wanted.folds[1][path]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="collect every site once"):
        _ = wanted | wanted
    other = scanned()
    with pytest.raises(ValueError, match="another function"):
        _ = wanted | collect(other.apply, other.params, other.batches)


@pytest.mark.full
def test_a_tied_matrix_when_asked_for():
    model = transposed()
    stats = collect(model.apply, model.params, model.batches, sites=["embed"])
    assert list(stats.folds[0]) == ["embed"]
    with pytest.raises(KeyError, match="no site matches 'embed'"):
        collect(model.apply, model.params, model.batches, where="embed")


@pytest.mark.full
def test_one_program_per_shape():
    model, traces = unrolled(), []

    def apply(params, ids):
        traces.append(ids.shape)
        return model.apply(params, ids)

    ids = model.batches[0]
    collect(apply, model.params, [ids, ids, ids[:1], ids[:1], ids])
    assert traces == [(2, 6), (2, 6), (1, 6)]  # the first time for the table of sites


def test_shapes_are_enough_for_the_program_of_a_batch():
    model = scanned()
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), model.params)
    ids = jax.ShapeDtypeStruct(model.batches[0].shape, model.batches[0].dtype)
    run = Collection(model.apply, shapes, (ids,), needs_of(["modegpt"], loss=True), loss)
    call = open_call(shapes, (ids,), {}, kernels=False)
    found, _ = jax.eval_shape(run.program(call), run.folds[0], run.leaves, [ids], run.bases)
    stats = collect(model.apply, model.params, model.batches, loss=loss, method="modegpt")
    described = [
        jax.tree.map(lambda a: (a.shape, a.dtype), fold) for fold in (found, stats.folds[0])
    ]
    assert described[0] == described[1]


def test_progress_is_reported():
    model, seen = MODELS["mixed"](), []
    collect(model.apply, model.params, model.batches, progress=lambda *row: seen.append(row))
    assert seen == [("statistics", 1, 2), ("statistics", 2, 2)]


@pytest.mark.full
def test_kernels_in_the_tree_are_parameters_themselves():
    from lordjax import compressed, factorize

    model = unrolled()
    small = factorize(model.params, rank=3, where="head")
    stats = collect(compressed(model.apply), small, model.batches)
    assert stats.folds[0]["head/right"]["input"].mean.shape == (3,)


def wrong(change=None, **options):
    model = MODELS["mixed"]()
    model = Model(*model) if change is None else change(model)
    return lambda: collect(model.apply, model.params, model.batches, **options)


def test_bad_input_is_named():
    with pytest.raises(KeyError, match=r"no method 'lrod'; did you mean lord"):
        wrong(method="lrod")()
    with pytest.raises(ValueError, match="lord: needs gradients"):
        wrong(method="lord")()
    with pytest.raises(KeyError, match="no site matches 'nothing'"):
        wrong(where="nothing")()
    with pytest.raises(ValueError, match="embed: cannot be compressed, because of no product"):
        wrong(sites=["embed"])()
    with pytest.raises(KeyError, match="no parameter 'upp'; did you mean up"):
        wrong(sites=["upp"])()
    with pytest.raises(ValueError, match="there is no batch"):
        wrong(lambda m: m._replace(batches=[]))()
    with pytest.raises(KeyError, match=r"the function has no site; .*no product uses it"):
        wrong(lambda m: m._replace(apply=lambda p, ids: p["embed"][ids] * 2))()


def test_a_batch_with_nan_is_named():
    model = MODELS["mixed"]()
    apply = lambda params, ids, x: model.apply(params, ids) * x.astype(jnp.bfloat16)  # noqa: E731
    batches = [(ids, jnp.ones(())) for ids in model.batches]
    batches[1] = (model.batches[1], jnp.asarray(jnp.nan))
    with pytest.raises(ValueError, match=r"batch 1: the statistics of .* are not finite"):
        collect(apply, model.params, batches, loss=lambda out, ids, x: loss(out, ids))


def test_a_function_that_changes_between_batches_is_refused():
    model = MODELS["mixed"]()

    def apply(params, ids):
        return model.apply(params, ids) if len(ids) > 1 else params["embed"][ids] @ params["up"]

    with pytest.raises(ValueError, match="head: no product uses it in this batch"):
        collect(apply, model.params, [model.batches[0], model.batches[0][:1]])


def test_paths_are_those_of_the_tree():
    model = unrolled()
    names = find_sites(model.apply, model.params, model.batches[0]).names()
    assert set(names) < set(trees.flatten(model.params))


@pytest.mark.parametrize(
    "change", [lambda a: 2 * a, lambda a: a[::-1], lambda a: a.at[7, 3].set(0.1), jnp.zeros_like]
)
def test_checksums_tell_parameters_apart(change):
    """Also where the bits of all numbers change alike: 1024 times 2^23 is 0 in 32 bits."""
    weights = jax.random.normal(jax.random.key(0), (16, 64))
    found = checksums({"same": jnp.array(weights), "a": weights, "b": change(weights)})
    assert found["same"] == found["a"] != found["b"]
