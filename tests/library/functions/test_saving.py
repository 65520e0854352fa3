"""Parameter trees with kernels on disk."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain import MODELS, transposed, unrolled

from lordjax import (
    Plan,
    compress_params,
    compressed,
    encode,
    factorize,
    find_sites,
    load_params,
    save_params,
)
from lordjax.kernels.normal_float import Format
from lordjax.kernels.quantized import NFQuantized
from lordjax.storage import shards
from lordjax.storage.tensor_files import checksum, write_tensors

NF2 = Format(2, 2, "float16", 16, 4)


def made(model, method="svd", **budget):
    table = find_sites(model.apply, model.params, model.batches[0])
    return compress_params(model.params, table, method=method, **(budget or {"keep": 0.5}))


@pytest.mark.quick("transposed-svd")
@pytest.mark.parametrize("method", ["svd", "nf", "lq"])
@pytest.mark.parametrize("name", ["unrolled", "transposed", "scanned"])
def test_trees_come_back(tmp_path, name, method):
    model = MODELS[name]()
    budget = {"svd": {"keep": 0.5}, "nf": {"bits": 4.5}, "lq": {"bits": 4.5, "rank": 2}}[method]
    small, plan = made(model, method, **budget)
    where = save_params(tmp_path / "small", small, plan)
    back = load_params(where, model.params)
    assert jax.tree.structure(back) == jax.tree.structure(small)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(small), strict=True):
        np.testing.assert_array_equal(a, b)
    assert Plan.read(where / "plan.json") == plan
    fast = compressed(model.apply)
    np.testing.assert_array_equal(fast(back, model.batches[0]), fast(small, model.batches[0]))


@pytest.mark.full
def test_orbax_keeps_trees_with_kernels(tmp_path):
    import orbax.checkpoint as ocp

    model = transposed()
    small, _ = made(model, "lq", bits=4.5, rank=2)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), small)
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "small", small)
        saver.wait_until_finished()
        back = saver.restore(tmp_path / "small", shapes)
    assert jax.tree.structure(back) == jax.tree.structure(small)
    fast = compressed(model.apply)
    np.testing.assert_array_equal(fast(back, model.batches[0]), fast(small, model.batches[0]))


def test_nested_dicts_need_no_example(tmp_path):
    params = {"a": {"w": jnp.ones((6, 8)), "b": jnp.ones(8)}}
    small = factorize(params, rank=2, where="w")
    back = load_params(save_params(tmp_path / "x", small))
    assert jax.tree.structure(back) == jax.tree.structure(small)
    stack = {"stack": NFQuantized.encode(jax.random.normal(jax.random.key(1), (2, 3, 8, 6)), NF2)}
    back = load_params(save_params(tmp_path / "stack", stack))
    assert jax.tree.structure(back) == jax.tree.structure(stack)
    jax.tree.map(np.testing.assert_array_equal, back, stack)
    with pytest.raises(ValueError, match=r"a/w would hold 48 non-finite value"):
        save_params(tmp_path / "nan", {"a": {"w": jnp.full((6, 8), jnp.nan)}})
    assert not (tmp_path / "nan").exists()


@pytest.mark.full
def test_shapes_are_an_example(tmp_path):
    model = unrolled()
    small, _ = made(model)
    where = save_params(tmp_path / "x", small)
    back = load_params(where, jax.eval_shape(lambda: model.params))
    assert jax.tree.structure(back) == jax.tree.structure(small)


def refused(tmp_path, change, match, like=None):
    model = transposed()
    where = save_params(tmp_path / "x", encode(model.params, where="fc1/kernel"))
    change(where)
    with pytest.raises(ValueError, match=match):
        load_params(where, like)


def test_files_that_were_changed_or_cut_are_refused(tmp_path):
    def cut(where):
        file = where / "params.safetensors"
        file.write_bytes(file.read_bytes()[:-8])

    def flip(where):
        file = where / "params.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(bytes(data))

    def older(where):
        """The same directory, as format 1 was."""
        file = where / "params.json"
        about = json.loads(file.read_text())
        written = checksum(where / "params.safetensors")._asdict()
        file.write_text(
            json.dumps({**about, "format": 1, "files": {"params.safetensors": written}})
        )
        (where / "checksums.json").unlink()

    def poison(where):
        model = transposed()
        small = jax.tree.map(np.array, encode(model.params, where="fc1/kernel"))
        small["embed"][1, 2] = np.nan
        write_tensors(where / "params.safetensors", shards.tensors(small))
        older(where)

    refused(tmp_path / "1", cut, "params.safetensors: the arrays end at .* is the file truncated")
    refused(tmp_path / "2", flip, "params.safetensors: .* was changed")
    refused(tmp_path / "3", lambda w: (w / "params.safetensors").unlink(), "is missing")
    refused(tmp_path / "4", lambda w: (w / "params.json").unlink(), "not written by save_params")
    refused(tmp_path / "5", lambda w: (w / "params.json").write_text("{}"), "not written by save")
    newer = '{"format": 99, "files": {}, "kinds": {}}'
    refused(tmp_path / "6", lambda w: (w / "params.json").write_text(newer), "reads 1 to 2")
    refused(tmp_path / "7", lambda w: (w / "checksums.json").unlink(), "checksums.json: is missing")
    refused(tmp_path / "8", lambda w: (older(w), flip(w)), "params.safetensors: was changed")
    refused(tmp_path / "9", poison, r"embed holds 1 non-finite .* at \(1, 2\)")
    flip(tmp_path / "2" / "x")
    assert load_params(tmp_path / "2" / "x").keys() == transposed().params.keys()
    older(tmp_path / "2" / "x")
    assert load_params(tmp_path / "2" / "x").keys() == transposed().params.keys()
    flip(tmp_path / "2" / "x")
    assert load_params(tmp_path / "2" / "x", verify=False).keys() == transposed().params.keys()


@pytest.mark.full
def test_another_structure_is_refused(tmp_path):
    like = transposed().params
    like["blocks"][0]["fc1"]["bias"] = jnp.ones(3)
    refused(
        tmp_path / "1", lambda w: None, r"has \[24\] at blocks/0/fc1/bias; expected \[3\]", like
    )
    like = transposed().params | {"more": jnp.ones(2)}
    refused(tmp_path / "2", lambda w: None, "has nothing at more", like)
    like = {"embed": transposed().params["embed"]}
    refused(tmp_path / "3", lambda w: None, "is not in like", like)


def test_a_directory_is_never_replaced(tmp_path):
    save_params(tmp_path / "x", {"a": jnp.ones(2)})
    with pytest.raises(FileExistsError, match="not an empty directory"):
        save_params(tmp_path / "x", {"a": jnp.ones(2)})
