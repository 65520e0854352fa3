"""A saved model is exact, describes itself, has the reported size, and is never half-written."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from saved_models import CONFIG, HF_CONFIG, SHARD, dense, edit, encode, model, quantized, write

from lordjax import InMemory, LowRank, Plan, compress, load, nbytes, save
from lordjax.allocation.plan import SiteSize
from lordjax.kernels import trees
from lordjax.kernels.normal_float import Format
from lordjax.kernels.quantized import LowRankPlusQuantized
from lordjax.models import Transformer
from lordjax.storage import shards
from lordjax.storage.checkpoint import INDEX
from lordjax.storage.saved_model import is_compressed, open_saved
from lordjax.storage.tensor_files import write_tensors


def assert_identical(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for have, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        have, want = np.asarray(have), np.asarray(want)
        assert have.dtype == want.dtype and have.shape == want.shape
        assert have.tobytes() == want.tobytes()


def litter(directory):
    return sorted(path.name for path in directory.iterdir())


# --- round trip ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_round_trip_is_exact(tmp_path, dtype):
    params = jax.tree.map(lambda a: a.astype(dtype), model())
    # The bits of special values survive, too.
    limits = jnp.finfo(dtype)
    odd = jnp.array([limits.max, limits.min, -0.0, limits.smallest_subnormal], dtype)
    params["final_norm"] = {"scale": jnp.resize(odd, 16)}
    assert write(tmp_path / "out", params) == tmp_path / "out"
    config, loaded = load(tmp_path / "out")
    assert config == CONFIG
    assert isinstance(trees.flatten(loaded)["layer_1/mlp/down/kernel"].left, LowRank)
    assert_identical(loaded, params)
    assert litter(tmp_path) == ["out"]


def test_round_trip_of_quantised_kernels_is_exact(tmp_path):
    saved = open_saved(write(tmp_path / "out", quantized()))
    # Sizes and formats are part of the structure.
    assert_identical(saved.params(), quantized())
    promised = saved.leaves()
    for path, leaf in trees.flatten(quantized()).items():
        assert promised[path] == jax.eval_shape(lambda leaf=leaf: leaf)
        assert_identical(saved.read(path), leaf)
    assert {len(path.split("/")) for path in saved.meta["kinds"]} == {4, 5, 6}
    # Formats can be read by people.
    formats = {table["format"] for table in saved.meta["constants"].values()}
    assert formats >= {"nf2-2-float16-16-4", "nf4-8-float32-64-256"}


def test_quantised_kernels_take_their_bytes_on_disk(tmp_path):
    kernels = {
        "plain": encode(jnp.zeros((512, 600)), Format(3)),
        "plus": LowRankPlusQuantized(
            encode(jnp.zeros((512, 600)), Format(2, 2, "bfloat16")),
            LowRank(jnp.zeros((512, 8)), jnp.zeros((8, 600))),
        ),
    }
    params = {name: {"kernel": kernel} for name, kernel in kernels.items()}
    codes = 512 * 600 * (3 + 2) // 8
    assert codes < nbytes(params) - 8 * 1112 * 4 < 1.05 * codes
    write(tmp_path / "out", params, shard_bytes=2**30)
    files = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert nbytes(params) < files < 1.01 * nbytes(params)


def test_load_needs_nothing_else(tmp_path):
    write(tmp_path / "a" / "deep" / "out")
    shutil.move(tmp_path / "a" / "deep" / "out", tmp_path / "moved")
    shutil.rmtree(tmp_path / "a")
    config, params = load(str(tmp_path / "moved"))
    tokens = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
    np.testing.assert_array_equal(
        Transformer(config).apply({"params": params}, tokens),
        Transformer(CONFIG).apply({"params": model()}, tokens),
    )


def test_size_on_disk_is_what_was_reported(tmp_path):
    write(tmp_path / "out", report={"bytes": nbytes(model()), "layers": {}})
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    headers = 0
    for i, shard in enumerate(shards):
        assert shard.name == f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        header = 8 + int.from_bytes(shard.read_bytes()[:8], "little")
        assert shard.stat().st_size - header <= SHARD
        headers += header
    files = sum(shard.stat().st_size for shard in shards)
    assert files == nbytes(model()) + headers
    report = open_saved(tmp_path / "out").report()
    assert report["file_bytes"] == files
    assert report["bytes"] == nbytes(load(tmp_path / "out")[1])
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == nbytes(model())


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(tmp_path):
    write(tmp_path / "out", shard_bytes=1)
    shards = list((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) == len(jax.tree.leaves(model()))
    assert_identical(load(tmp_path / "out")[1], model())


def test_directory_describes_itself(tmp_path):
    plan = Plan("lord", {"layer_0/mlp/up/kernel": 6}, 0.7, "global", 0.01)
    report = {"calibration": {"windows": 3}, "settings": {"seed": 1}}
    write(
        tmp_path / "out",
        plan=plan,
        report=report,
        write_tokenizer=lambda path: (path / "tokenizer.json").write_text("{}"),
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    ours = config.pop("lordjax")
    assert config == HF_CONFIG
    assert ours["method"] == "lord" and ours["calibration"] == {"windows": 3}
    assert ours["settings"] == {"seed": 1}
    assert set(ours["kinds"].values()) == {"low_rank"}
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    saved = open_saved(tmp_path / "out")
    assert saved.plan() == plan and saved.hf_config == HF_CONFIG
    assert saved.report().items() >= report.items()
    assert is_compressed(tmp_path / "out") and not is_compressed(tmp_path)
    bare = open_saved(write(tmp_path / "bare"))
    assert bare.plan() is None and bare.report() == {}


def test_reads_only_what_is_asked_for(tmp_path):
    saved = open_saved(write(tmp_path / "out"))
    first = {file for name, file in saved.files.items() if name.startswith("layer_0/")}
    for file in set(saved.files.values()) - first:
        (saved.directory / file).unlink()
    assert_identical(saved.block(0), model()["layer_0"])
    with pytest.raises(ValueError, match="model-0000"):
        saved.params()


def test_reads_below_a_path(tmp_path):
    # layer_1 is not layer_10.
    config = dataclasses.replace(CONFIG, num_layers=11, windows=None)
    rest = {name: part for name, part in dense().items() if not name.startswith("layer_")}
    params = rest | {
        f"layer_{i}": jax.tree.map(lambda a, i=i: a + i, dense()["layer_0"]) for i in range(11)
    }
    saved = open_saved(save(tmp_path / "out", config, params, hf_config=HF_CONFIG))
    for i in (0, 1, 10):
        assert_identical(saved.block(i), params[f"layer_{i}"])
    assert_identical(saved.non_block_params(), rest)
    assert_identical(saved.read("layer_1/mlp"), params["layer_1"]["mlp"])
    with pytest.raises(KeyError, match="no parameter below 'layer_17'"):
        saved.block(17)
    whole = open_saved(write(tmp_path / "model"))
    kernel = trees.flatten(model())["layer_1/mlp/down/kernel"]
    assert_identical(whole.read("layer_1/mlp/down/kernel"), kernel)


def test_a_directory_written_anew_is_read_anew(tmp_path):
    write(tmp_path / "out")
    assert_identical(load(tmp_path / "out")[1], model())
    shutil.rmtree(tmp_path / "out")
    other = jax.tree.map(lambda a: a + 1, model())
    write(tmp_path / "out", other)
    assert_identical(load(tmp_path / "out")[1], other)


def test_a_saved_model_is_compressed_like_the_one_in_memory(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 31, (2, 8))
    saved = open_saved(write(tmp_path / "out", dense()))
    from_disk = compress(saved, tokens, method="svd-llm", keep=0.6)
    in_memory = compress(InMemory(CONFIG, dense()), tokens, method="svd-llm", keep=0.6)
    assert from_disk.plan == in_memory.plan
    assert_identical(from_disk.params, in_memory.params)


@pytest.mark.full
def test_a_compressed_model_can_be_compressed_again(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 31, (2, 8))
    first = compress(InMemory(CONFIG, dense()), tokens, method="svd", keep=0.8)
    saved = open_saved(write(tmp_path / "out", first.params))
    second = compress(saved, tokens, method="svd", keep=0.5)
    assert nbytes(second.params) < nbytes(first.params)
    # Weight SVD nests: a rank taken in two steps is the rank taken at once.
    direct = compress(InMemory(CONFIG, dense()), tokens, method="svd", keep=0.5)
    for path, kernel in trees.flatten(direct.params).items():
        if isinstance(kernel, LowRank):
            again = trees.flatten(second.params)[path]
            np.testing.assert_allclose(again.materialize(), kernel.materialize(), atol=1e-4)


# --- nothing half-written ------------------------------------------------------------------------


def test_a_destination_in_use_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    (tmp_path / "file").write_text("keep")
    for name in ("out", "file"):
        with pytest.raises(FileExistsError, match=rf"{name}: exists .* choose another output"):
            write(tmp_path / name)
    assert litter(tmp_path) == ["file", "out"] and litter(tmp_path / "out") == ["mine"]
    assert (tmp_path / "file").read_text() == (tmp_path / "out" / "mine").read_text() == "keep"


def test_an_empty_directory_is_a_destination(tmp_path):
    (tmp_path / "out").mkdir()
    write(tmp_path / "out")
    assert_identical(load(tmp_path / "out")[1], model())


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("exists", [False, True])
def test_failure_while_tensors_are_written(tmp_path, monkeypatch, error, exists):
    if exists:
        (tmp_path / "out").mkdir()
    written = []

    def fails(file, arrays, metadata):
        if len(written) == 2:
            raise error
        written.append(file)
        return write_tensors(file, arrays, metadata)

    monkeypatch.setattr(shards, "write_tensors", fails)
    with pytest.raises(type(error)):
        write(tmp_path / "out")
    assert len(written) == 2  # it failed in the middle
    assert litter(tmp_path) == (["out"] if exists else [])
    assert not exists or litter(tmp_path / "out") == []


def test_failure_of_the_tokenizer_writer(tmp_path):
    def fails(directory):
        (directory / "tokenizer.json").write_text("half")
        raise RuntimeError("no tokenizer")

    with pytest.raises(RuntimeError, match="no tokenizer"):
        write(tmp_path / "out", write_tokenizer=fails)
    assert litter(tmp_path) == []


def test_a_destination_taken_meanwhile_is_not_overwritten(tmp_path):
    def somebody_else(_):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("keep")

    with pytest.raises(OSError):
        write(tmp_path / "out", write_tokenizer=somebody_else)
    assert litter(tmp_path) == ["out"] and litter(tmp_path / "out") == ["mine"]


def test_no_room_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"out: needs about .* MB of disk, but 1 MB are free"):
        write(tmp_path / "new" / "out")
    assert litter(tmp_path) == []


# --- plans ---------------------------------------------------------------------------------------

PLAN = Plan("lord", {"layer_0/a/kernel": 8, "layer_0/b/kernel": None}, 0.8, "global", 0.003)


def test_plan_round_trip(tmp_path):
    PLAN.write(tmp_path / "plan.json")
    assert Plan.read(tmp_path / "plan.json") == PLAN


def test_an_edited_plan_is_read(tmp_path):
    PLAN.write(tmp_path / "plan.json")
    edit(tmp_path / "plan.json", lambda plan: plan["ranks"].update({"layer_0/b/kernel": 3}))
    plan = Plan.read(tmp_path / "plan.json")
    assert plan.ranks == {"layer_0/a/kernel": 8, "layer_0/b/kernel": 3}
    sizes = {
        "layer_0/a/kernel": SiteSize.matrix(20, 30),
        "layer_0/b/kernel": SiteSize.matrix(10, 12),
    }
    assert PLAN.weights(sizes) == 8 * 50 + 120
    assert plan.weights(sizes) == 8 * 50 + 3 * 22


def set_rank(rank):
    return lambda file: edit(file, lambda plan: plan["ranks"].update({"layer_0/a/kernel": rank}))


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_text("not json"),
        lambda file: file.write_bytes(b"\xff\x00"),
        lambda file: file.write_text("[]"),
        lambda file: file.write_text("3"),
        lambda file: edit(file, lambda plan: plan.pop("ranks")),
        lambda file: edit(file, lambda plan: plan.update(colour="red")),
        lambda file: edit(file, lambda plan: plan.update(ranks=[1, 2])),
        set_rank(0),
        set_rank(-3),
        set_rank(2.5),
        set_rank("8"),
        set_rank(True),
    ],
    ids=["text", "bytes", "list", "number", "lacks", "unknown", "ranks", *"abcde"],
)
def test_a_plan_that_is_none_names_its_file(tmp_path, damage):
    PLAN.write(tmp_path / "plan.json")
    damage(tmp_path / "plan.json")
    with pytest.raises(ValueError, match=r"plan\.json: "):
        Plan.read(tmp_path / "plan.json")
