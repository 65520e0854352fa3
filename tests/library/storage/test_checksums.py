"""Our own directories are believed only as far as their checksums and their config go."""

import dataclasses
import json
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from saved_models import CONFIG, HF_CONFIG, dense, edit, model, write

from lordjax import Plan, load, save
from lordjax.kernels import trees
from lordjax.storage.checkpoint import INDEX
from lordjax.storage.checksums import MANIFEST, Manifest, fingerprint
from lordjax.storage.saved_model import open_saved
from lordjax.storage.tensor_check import check_finite
from lordjax.storage.tensor_files import TensorFile, write_tensors

EMBEDDING, NORM, UP = "embed/embedding", "final_norm/scale", "layer_0/mlp/up/kernel"


def without_checksums(directory):
    """Makes a directory like those of older versions."""
    (directory / MANIFEST).unlink()
    edit(directory / "config.json", lambda config: config["lordjax"].pop("checksums"))


def rewrite(directory, change):
    """Changes the tensors in the file of the non-block parameters, or of all; a whole file."""
    index = json.loads((directory / INDEX).read_text())
    file = directory / index["weight_map"][EMBEDDING]
    arrays = {name: np.array(array) for name, array in TensorFile(file).items()}
    change(arrays)
    write_tensors(file, arrays, {"format": "lordjax"})
    others = {name: f for name, f in index["weight_map"].items() if f != file.name}
    index["weight_map"] = others | dict.fromkeys(arrays, file.name)
    (directory / INDEX).write_text(json.dumps(index))


# --- the checksum --------------------------------------------------------------------------------


def test_a_checksum_stays_what_it_is():
    """Directories on disk have these numbers, which are the check values of the algorithms."""
    assert fingerprint(np.zeros((0, 3))) == "2d06800538d394c2"
    assert fingerprint(np.frombuffer(b"123456789", np.int8), "crc32") == "cbf43926"


@pytest.mark.parametrize("change", [False, True])
def test_checksums_of_before_are_read(tmp_path, change):
    array = np.arange(12.0).reshape(3, 4)
    row = {"dtype": "float64", "shape": [3, 4], "crc32": fingerprint(array, "crc32")}
    content = {"format": 1, "tensors": {"x": row}, "files": {}}
    (tmp_path / "checksums.json").write_text(json.dumps(content))
    manifest = Manifest.read(tmp_path)
    with pytest.raises(ValueError, match="x was changed") if change else nullcontext():
        manifest.check_tensor("x", array + change, tmp_path / "file")


def test_every_change_has_another_checksum():
    rng = np.random.default_rng(0)
    array = rng.integers(0, 256, (64, 4096), np.uint8)
    original, found = fingerprint(array), set()
    for bit in rng.integers(0, 8 * array.size, 60):
        other = array.copy()
        other.reshape(-1)[bit // 8] ^= 1 << (bit % 8)
        found.add(fingerprint(other))
    swapped = array.copy()
    swapped[[0, 32]] = swapped[[32, 0]]
    signs = array.copy()
    signs[:, 1::2] ^= 128  # of all numbers, in bfloat16
    found |= {fingerprint(swapped), fingerprint(signs), fingerprint(array[::-1])}
    found |= {fingerprint(array[:, 1:]), fingerprint(array.T), fingerprint(np.zeros_like(array))}
    assert original not in found and len(found) == 66
    assert fingerprint(np.asfortranarray(array)) == original
    assert fingerprint(array.view(np.float64)) == original


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, jnp.bfloat16])
def test_numbers_that_are_not_finite_are_found(dtype):
    limits = jnp.finfo(dtype)
    array = np.array([limits.max, limits.min, -0.0, limits.smallest_subnormal], dtype)
    check_finite(np.tile(array, (2, 40_000)), "x holds")
    check_finite(np.arange(-5, 5), "integers hold")
    check_finite(np.zeros((0, 3), dtype), "nothing holds")
    for number in (np.nan, -np.nan, np.inf, -np.inf):
        broken = np.tile(array, (2, 40_000))
        broken[1, 70_001] = number
        with pytest.raises(ValueError, match=r"x holds 1 non-finite .* first at \(1, 70001\)"):
            check_finite(broken, "x holds")


# --- changed directories -------------------------------------------------------------------------


def flip(name):
    """Changes one bit of a tensor in its file."""

    def change(directory):
        saved = open_saved(directory)
        file = saved.opened[saved.files[name]]
        at = file.path.stat().st_size - sum(map(file.nbytes, file)) + file.start(name)
        data = bytearray(file.path.read_bytes())
        data[at] ^= 1
        file.path.write_bytes(data)

    return change


def swap(first, second):
    """Swaps the values of two tensors of one shape."""

    def change(directory):
        saved = open_saved(directory)
        places = []
        for name in (first, second):
            file = saved.opened[saved.files[name]]
            at = file.path.stat().st_size - sum(map(file.nbytes, file)) + file.start(name)
            places.append((file.path, at, file.read(name).tobytes()))
        for (path, at, _), (_, _, values) in zip(places, places[::-1], strict=True):
            with path.open("r+b") as handle:
                handle.seek(at)
                handle.write(values)

    return change


def changed(**fields):
    return lambda d: edit(d / "config.json", lambda c: c["lordjax"]["model"].update(fields))


def drop_row(table, name):
    return lambda d: edit(d / MANIFEST, lambda content: content[table].pop(name))


# What checksums notice, whatever the numbers are.
CHANGES = {
    "a bit of a dense tensor": (flip(EMBEDDING), EMBEDDING),
    "a bit of a factor": (flip(f"{UP}/left"), f"{UP}/left"),
    "factors of two sites": (swap(f"{UP}/left", UP.replace("_0", "_1") + "/left"), "mlp/up/kernel"),
    "a setting of the model": (changed(norm_eps=1e-3), "config.json"),
    "the original config": (
        lambda d: edit(d / "config.json", lambda config: config.update(eos_token_id=3)),
        "config.json",
    ),
    "the plan": (lambda d: edit(d / "plan.json", lambda plan: plan.update(keep=0.5)), "plan.json"),
    "the report": (lambda d: edit(d / "report.json", lambda r: r.update(bytes=1)), "report.json"),
    "a broken report": (lambda d: (d / "report.json").write_text("{"), "report.json"),
    "the tokenizer": (lambda d: (d / "vocab.txt").write_text("b"), "vocab.txt"),
    "no tokenizer": (lambda d: (d / "vocab.txt").unlink(), "vocab.txt: is missing"),
    "no manifest": (lambda d: (d / MANIFEST).unlink(), f"{MANIFEST}: is missing"),
    "a broken manifest": (lambda d: (d / MANIFEST).write_text('{"format": 1'), MANIFEST),
    "another manifest": (lambda d: (d / MANIFEST).write_text("[]"), MANIFEST),
    "a deep manifest": (lambda d: (d / MANIFEST).write_text("[" * 99_999), MANIFEST),
    "a newer manifest": (lambda d: edit(d / MANIFEST, lambda c: c.update(format=9)), "upgrade"),
    "a tensor without checksum": (drop_row("tensors", NORM), f"{NORM} is unknown"),
    "a plan without checksum": (drop_row("files", "plan.json"), "no checksum of plan.json"),
    "a checksum of another tensor": (
        lambda d: edit(d / MANIFEST, lambda c: c["tensors"][NORM].update(dtype="float16")),
        f"{NORM} is float32",
    ),
    "a file outside": (
        lambda d: edit(d / MANIFEST, lambda c: c["files"].update({"../../x": "0"})),
        "expected the name of a file in",
    ),
}


def made(directory):
    plan = Plan("svd", {"layer_0/mlp/up/kernel": 6}, 0.7, "uniform")
    tokenizer = {"write_tokenizer": lambda path: (path / "vocab.txt").write_text("a")}
    return write(directory, plan=plan, report={"bytes": 2, "gap": float("inf")}, **tokenizer)


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_refused_and_named(tmp_path, name):
    change, message = CHANGES[name]
    change(made(tmp_path / "out"))
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path / "out")
    assert str(tmp_path / "out") in str(caught.value) and "\n" not in str(caught.value)
    # Whoever insists gets the values as they are.
    config, params = load(tmp_path / "out", verify=False)
    assert config.num_layers == 2 and jax.tree.structure(params) == jax.tree.structure(model())


def put(name, value):
    def change(arrays):
        array = arrays[name]
        arrays[name] = value(array)

    return change


def number(value):
    def change(array):
        array[-1] = value
        return array

    return change


# What a config and the numbers themselves tell, with checksums or without.
IMPOSSIBLE = {
    "a NaN": (put(NORM, number(np.nan)), rf"{NORM} holds 1 non-finite .* at \(15,\)"),
    "an infinite number": (put(EMBEDDING, number(-np.inf)), f"{EMBEDDING} holds 16 non-finite"),
    "a transposed embedding": (put(EMBEDDING, np.transpose), f"wrong shape: {EMBEDDING}"),
    "a norm of integers": (put(NORM, lambda a: a.view(np.int32)), f"wrong dtype: {NORM} is int32"),
    "a narrow norm": (put(NORM, lambda a: a[:8]), rf"wrong shape: {NORM} is \(8,\), not \(16,\)"),
    "no final norm": (lambda arrays: arrays.pop(NORM), f"missing: {NORM}"),
    "one tensor more": (lambda arrays: arrays.update(x=np.ones(2)), r"unknown: x \(2,\)"),
    "half a block more": (
        lambda arrays: arrays.update({"layer_2/mlp_norm/scale": np.ones(16)}),
        "3 blocks are there .layer_0 to layer_2., but the config says 2",
    ),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
@pytest.mark.parametrize("kind", ["older", "insisted"])
def test_what_cannot_be_is_refused_without_checksums(tmp_path, name, kind):
    change, message = IMPOSSIBLE[name]
    write(tmp_path / "out", shard_bytes=2**30)
    if kind == "older":
        without_checksums(tmp_path / "out")
    rewrite(tmp_path / "out", change)
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path / "out", verify=kind == "older")
    assert str(tmp_path / "out") in str(caught.value) and "\n" not in str(caught.value)


CONFIGS = {
    "fewer layers": ({"num_layers": 1, "windows": [None]}, "2 blocks are there"),
    "more layers": ({"num_layers": 9_999, "windows": None}, "the config says 9999 layers"),
    "no such norm": ({"norm": "median"}, "config.json: no model has these settings"),
    "a norm that is a number": ({"norm": 3}, "norm = 3: expected a str"),
    "no number": (
        {"norm_eps": float("nan")},
        "config.json: not JSON .number NaN; expected",
    ),
    "a text": ({"causal": "yes"}, "causal = 'yes': expected a bool"),
    "windows of another model": ({"windows": [None]}, "windows: expected"),
    "a rotary embedding of text": ({"rope": "x"}, "config.json: damaged"),
    "no model": (None, "config.json: damaged"),
    "other heads": ({"num_kv_heads": 4}, "wrong shape: layer_0/attention/k/kernel"),
    "a bias": ({"qkv_bias": True}, "missing: layer_0/attention/k/bias"),
    "a tied head": ({"tie_embeddings": True}, "unknown: head/kernel"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_another_config_is_refused_without_checksums(tmp_path, name):
    fields, message = CONFIGS[name]
    write(tmp_path / "out")
    without_checksums(tmp_path / "out")
    if fields is None:
        edit(tmp_path / "out" / "config.json", lambda c: c["lordjax"].update(model=[1]))
    else:
        changed(**fields)(tmp_path / "out")
    with pytest.raises(ValueError, match=message) as caught:
        open_saved(tmp_path / "out")
    assert str(tmp_path / "out") in str(caught.value)


def test_a_rotary_pair_that_does_not_exist_is_refused(tmp_path):
    params = jax.tree.map(np.array, dense())
    attention = params["layer_0"]["attention"]
    for name, heads in (("q", 4), ("k", 2)):
        kernel = attention[name]["kernel"].reshape(16, heads, 4)[:, :, ::2]
        attention[name]["kernel"] = kernel.reshape(16, -1)
    attention["rope_index"] = np.array([[0], [1]], np.int32)
    assert load(write(tmp_path / "good", params))[0] == CONFIG
    attention["rope_index"] = np.array([[0], [2]], np.int32)
    with pytest.raises(ValueError, match=r"layer_0/attention/rope_index holds an index outside 0"):
        load(write(tmp_path / "bad", params))
    attention["rope_index"] = np.zeros((2, 1))
    with pytest.raises(ValueError, match=r"wrong dtype: layer_0/attention/rope_index"):
        load(write(tmp_path / "floats", params))


def test_older_directories_open_and_say_so(tmp_path):
    without_checksums(write(tmp_path / "out"))
    saved = open_saved(tmp_path / "out")
    assert len(saved.notes) == 1 and "kept no checksums" in saved.notes[0]
    for path, leaf in trees.flatten(saved.params()).items():
        jax.tree.map(np.testing.assert_array_equal, leaf, trees.flatten(model())[path])
    assert open_saved(tmp_path / "out", verify=False).notes == ()
    assert open_saved(write(tmp_path / "new")).notes == ()


def test_one_block_is_checked_without_the_others(tmp_path):
    write(tmp_path / "out")
    flip("layer_1/mlp/gate/kernel/left")(tmp_path / "out")
    saved = open_saved(tmp_path / "out")
    saved.block(0), saved.non_block_params()
    with pytest.raises(ValueError, match=r"layer_1/mlp/gate/kernel/left was changed"):
        saved.block(1)


def test_what_is_not_finite_is_not_saved(tmp_path):
    params = jax.tree.map(np.array, dense())
    params["layer_1"]["mlp"]["down"]["kernel"][2, 3] = np.inf
    with pytest.raises(ValueError, match=r"layer_1/mlp/down/kernel would hold 1 non-finite"):
        save(tmp_path / "out", CONFIG, params, hf_config=HF_CONFIG)
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_rotary_positions_has_no_index(tmp_path):
    config = dataclasses.replace(CONFIG, rope=None)
    params = jax.tree.map(np.array, dense())
    params["layer_0"]["attention"]["rope_index"] = np.array([[0], [1]], np.int32)
    save(tmp_path / "out", config, params, hf_config=HF_CONFIG)
    with pytest.raises(ValueError, match="unknown: layer_0/attention/rope_index"):
        load(tmp_path / "out")
