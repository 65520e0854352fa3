"""Files: safetensors and torch files give the same parameters; damage is named."""

import json
import weakref
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
from damage import fails
from hf_models import hf_model
from safetensors.numpy import load_file, save_file

from lordjax.conversions.readers import tensor_files
from lordjax.conversions.readers.checkpoint import open_checkpoint
from lordjax.forecast import stage_memory
from lordjax.kernels.trees import flatten

torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")


def same(a, b):
    a, b = flatten(a), flatten(b)
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def test_sharded_and_torch_files_equal_one_file(model, directory, tmp_path_factory):
    one = open_checkpoint(directory).params()
    sharded = tmp_path_factory.mktemp("sharded")
    model.save_pretrained(sharded, max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert same(open_checkpoint(sharded).params(), one)

    shards = sorted(sharded.glob("*.safetensors"))
    names = {}
    for shard in shards:  # the same shards as torch files
        state = {k: torch.tensor(v) for k, v in load_file(shard).items()}
        file = shard.name.replace("model", "pytorch_model").replace("safetensors", "bin")
        names |= dict.fromkeys(state, file)
        torch.save(state, sharded / file)
        shard.unlink()
    (sharded / "model.safetensors.index.json").unlink()
    index = json.dumps({"weight_map": names})
    (sharded / "pytorch_model.bin.index.json").write_text(index)
    assert same(open_checkpoint(sharded).params(), one)

    single = tmp_path_factory.mktemp("bin")
    model.config.save_pretrained(single)
    for zipped in (True, False):  # False: as torch < 1.6 wrote it
        state, file = model.state_dict(), single / "pytorch_model.bin"
        torch.save(state, file, _use_new_zipfile_serialization=zipped)
        assert same(open_checkpoint(single).params(), one)


def test_blocks_are_read_alone(directory, monkeypatch):
    checkpoint = open_checkpoint(directory)
    read = []
    original = tensor_files.Safetensors.read
    monkeypatch.setattr(
        tensor_files.Safetensors, "read", lambda s, name: read.append(name) or original(s, name)
    )
    block = checkpoint.block(1)
    assert len(read) == 9
    assert all("layers.1." in name for name in read)
    params = checkpoint.params()
    assert same(block, params["layer_1"])
    assert same(
        checkpoint.non_block_params(), {k: params[k] for k in ("embed", "final_norm", "head")}
    )
    with pytest.raises(IndexError, match="block 2, but there are 2"):
        checkpoint.block(2)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_what_was_read_of_files_does_not_stay_mapped(directory, kind, monkeypatch):
    expected = open_checkpoint(directory).params()
    if kind == "bin":
        state = load_file(directory / "model.safetensors")
        (directory / "model.safetensors").unlink()
        half = len(state) // 2
        parts = {"a.bin": list(state)[:half], "b.bin": list(state)[half:]}
        for file, names in parts.items():
            values = {name: torch.from_numpy(state[name]) for name in names}
            torch.save(values, directory / file)
        index = {name: file for file, names in parts.items() for name in names}
        text = json.dumps({"weight_map": index})
        (directory / "pytorch_model.bin.index.json").write_text(text)
    monkeypatch.setattr(tensor_files, "PAGES", 1000)
    opened = open_checkpoint(directory)
    (files,) = [value for value in vars(opened).values() if isinstance(value, tensor_files._Mapped)]
    first = dict(files._handle)
    params = opened.params()
    assert same(params, expected)
    assert files._pages.total() <= 1000  # of all files together
    assert all(files._handle[file] is not handle for file, handle in first.items())
    if kind == "bin":  # what was read holds no mapping
        old = [weakref.ref(tensor) for handle in first.values() for tensor in handle.values()]
        del first
        assert not any(ref() is not None for ref in old)


def test_the_forecast_counts_the_pages_that_stay_mapped():
    assert stage_memory.PAGES == tensor_files.PAGES


def test_a_file_that_cannot_be_mapped_is_read_once(directory, monkeypatch):
    expected = open_checkpoint(directory).params()
    state = {n: torch.from_numpy(a) for n, a in load_file(directory / "model.safetensors").items()}
    (directory / "model.safetensors").unlink()
    file = directory / "pytorch_model.bin"
    torch.save(state, file, _use_new_zipfile_serialization=False)
    monkeypatch.setattr(tensor_files, "PAGES", 1000)
    opened, read = open_checkpoint(directory), []
    monkeypatch.setattr(torch, "load", lambda *args, **options: read.append(args))
    assert same(opened.params(), expected)
    assert not read


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_dtype_is_kept(directory, dtype, kind):
    half = hf_model("llama", {}).to(getattr(torch, dtype))
    expected = half.lm_head.weight.detach().float().numpy().T
    half.save_pretrained(directory)
    if kind == "bin":
        (directory / "model.safetensors").unlink()
        torch.save(half.state_dict(), directory / "pytorch_model.bin")
    checkpoint = open_checkpoint(directory)
    assert {leaf.dtype for leaf in flatten(checkpoint.params()).values()} == {jnp.dtype(dtype)}
    head = checkpoint.read("head/kernel", dtype=np.float32)
    assert head.dtype == np.float32
    np.testing.assert_array_equal(head, expected)


# --- Damage: each error names the thing ---


def edit(directory, change):
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return directory


def test_wrong_tensors_are_one_error(directory):
    def change(tensors):
        tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(8, np.float32)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.norm.weight"] = np.ones(31, np.float32)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    fails(
        edit(directory, change),
        "3 tensor(s)",
        "unknown: " + str(directory / "model.safetensors"),
        "tensor model.layers.0.self_attn.q_norm.weight (8,)",
        "missing: model.layers.1.mlp.up_proj.weight (48, 32)",
        "tensor model.norm.weight is (31,), not (32,)",
    )


def test_an_error_lists_ten_names_and_a_guess(directory):
    def change(tensors):
        for name in list(tensors):
            tensors[f"wrapped.{name}"] = tensors.pop(name)

    with pytest.raises(ValueError, match=r"all tensors begin with 'wrapped\.'; remove") as error:
        open_checkpoint(edit(directory, change))
    text = str(error.value)
    assert text.count("missing: ") == text.count("unknown: ") == 5
    assert "42 tensor(s)" in text and text.endswith("… and 32 more")


def test_fewer_layers_in_the_files_than_in_the_config(directory):
    config = json.loads((directory / "config.json").read_text()) | {"num_hidden_layers": 900}
    (directory / "config.json").write_text(json.dumps(config))
    fails(directory, "The files hold 2 layers, fewer than the config names", "… and 8,072 more")


def test_not_finite(directory):
    def change(tensors):
        tensors["model.layers.1.self_attn.q_proj.weight"][3, 5] = np.nan
        tensors["model.norm.weight"][2] = 1e10

    checkpoint = open_checkpoint(edit(directory, change))
    assert np.isfinite(checkpoint.block(0)["mlp"]["up"]["kernel"]).all()
    with pytest.raises(
        ValueError,
        match=r"model\.safetensors: tensor model\.layers\.1\.self_attn.*"
        r"layer_1/attention/q/kernel.* holds 1 non-finite .* \(3, 5\)",
    ):
        checkpoint.block(1)
    assert checkpoint.read("final_norm/scale").max() > 1e9
    with pytest.raises(ValueError, match=r"model\.norm\.weight.*cast to float16 has 1 non-finite"):
        checkpoint.non_block_params("float16")


def test_integer_tensor(directory):
    def change(tensors):
        tensors["model.norm.weight"] = np.ones(32, np.int8)

    fails(edit(directory, change), "model.norm.weight", "int8", then=lambda c: c.non_block_params())


@pytest.mark.parametrize("size", [5, 500, -7])
def test_truncated_safetensors(directory, size):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    fails(directory, "model.safetensors: not a complete safetensors file", "download it again")


def test_damaged_torch_file(model, tmp_path):
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), file := tmp_path / "pytorch_model.bin")
    file.write_bytes(file.read_bytes()[:5000])
    fails(tmp_path, "pytorch_model.bin: torch cannot load it")
    torch.save({"weight": print}, file)  # refused: unpickling it would run code
    fails(tmp_path, "pytorch_model.bin: torch cannot load it")


def test_torch_is_optional(directory, monkeypatch):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    fails(directory, "needs torch, which is not installed", kind=ImportError)


def test_missing_files(directory, tmp_path_factory):
    fails(directory / "nowhere" / "at" / "all", "no such file", kind=FileNotFoundError)
    fails(tmp_path_factory.mktemp("empty"), "no config.json", kind=FileNotFoundError)
    (directory / "model.safetensors").unlink()
    fails(directory, "no weights in this directory", kind=FileNotFoundError)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    fails(directory, "2 of 2 shards", "model-1.safetensors, model-2", kind=FileNotFoundError)
    (directory / "config.json").write_text("{")
    fails(directory, "config.json: not JSON")


def test_config_errors_name_the_file(directory):
    config = json.loads((directory / "config.json").read_text()) | {"clip_qkv": 8.0}
    (directory / "config.json").write_text(json.dumps(config))
    fails(directory, "config.json: clip_qkv = 8.0: unknown key")


def test_head_beside_tied_embedding(directory):
    config = json.loads((directory / "config.json").read_text()) | {"tie_word_embeddings": True}
    (directory / "config.json").write_text(json.dumps(config))
    fails(
        directory,
        "lm_head.weight differs",
        "tie_word_embeddings",
        then=lambda c: c.non_block_params(),
    )

    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    assert "head" not in open_checkpoint(edit(directory, change)).non_block_params()


def test_hub(directory, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = []

    def download(name, allow_patterns):
        asked.append(name)
        if name == "owner/away":
            raise LocalEntryNotFoundError("no connection")
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert open_checkpoint("owner/model").path == directory
    fails("owner/away", "no connection", "hub", kind=FileNotFoundError)
    assert asked == ["owner/model", "owner/away"]


@pytest.mark.parametrize("name", ["../other/a.safetensors", "/etc/hostname", "link", 3])
def test_shards_stay_in_the_directory(directory, tmp_path_factory, name):
    other = tmp_path_factory.mktemp("outside") / "a.safetensors"
    (directory / "model.safetensors").rename(other)
    (directory / "link").symlink_to(other)
    index = {"weight_map": {"model.norm.weight": name}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    fails(directory, "model.safetensors.index.json: ")


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"]
)
def test_files_of_a_model_are_no_links_out_of_it(directory, tmp_path_factory, name):
    """Else a model could have any file of the reader's read, and copied into what is written."""
    (directory / name).touch()
    other = (directory / name).rename(tmp_path_factory.mktemp("outside") / "a")
    (directory / name).symlink_to(other)

    def read(opened):
        return opened.tokenizer() if name == "tokenizer.json" else opened.generation_config()

    fails(directory, f"{directory}: {name} is a link to {other}, outside of", then=read)


def test_a_file_of_a_model_may_be_a_link_to_one_beside_it(directory):
    (directory / "model.safetensors").rename(directory / "beside")
    (directory / "model.safetensors").symlink_to("beside")
    assert open_checkpoint(directory).params()


def test_the_cache_of_the_hub_opens(directory, tmp_path_factory):
    """Its directories hold links to files beside them."""
    expected = open_checkpoint(directory).params()
    hub = tmp_path_factory.mktemp("hub") / "models--owner--name"
    snapshot, blobs = hub / "snapshots" / "0123abc", hub / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    names = list(load_file(directory / "model.safetensors"))
    index = {"weight_map": dict.fromkeys(names, "shard.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "model.safetensors").rename(directory / "shard.safetensors")
    for file in directory.iterdir():
        file.rename(blobs / file.name.replace(".", ""))
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name.replace('.', '')}")
    assert same(open_checkpoint(snapshot).params(), expected)


def _flip(data):
    at = len(data) // 2
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def test_values_of_torch_files_are_compared_with_checksums(model, tmp_path):
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), file := tmp_path / "pytorch_model.bin")
    file.write_bytes(_flip(file.read_bytes()))
    fails(tmp_path, "pytorch_model.bin: damaged (BadZipFile", then=lambda c: c.params())


def test_members_of_torch_files_have_the_sizes_of_their_tensors(model, tmp_path):
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "whole")
    for name, size, packed, message in (
        ("short", -16, zipfile.ZIP_STORED, "its members have other sizes than its tensors"),
        ("packed", None, zipfile.ZIP_DEFLATED, "is compressed"),
    ):
        (folder := tmp_path / name).mkdir()
        model.config.save_pretrained(folder)
        with (
            zipfile.ZipFile(tmp_path / "whole") as old,
            zipfile.ZipFile(folder / "pytorch_model.bin", "w", packed) as new,
        ):
            for member in old.namelist():
                cut = size if member.endswith("data/3") else None
                new.writestr(member, old.read(member)[:cut])
        fails(folder, "pytorch_model.bin: torch cannot load it as plain tensors", message)


def test_a_zip_file_of_several_disks_is_refused(model, tmp_path):
    model.config.save_pretrained(tmp_path)
    locator = b"PK\6\7" + bytes(12) + b"\2" + bytes(3)
    (tmp_path / "pytorch_model.bin").write_bytes(bytes(64) + locator + b"PK\5\6" + bytes(18))
    fails(tmp_path, "pytorch_model.bin: not a torch file (BadZipFile")


def test_a_view_larger_than_the_file_is_refused(model, tmp_path):
    model.config.save_pretrained(tmp_path)
    state = {"model.norm.weight": torch.zeros(1).expand(10**12)}
    torch.save(state, tmp_path / "pytorch_model.bin")
    fails(tmp_path, "model.norm.weight (1000000000000,) is larger than the file")


@pytest.mark.parametrize("damage", ["[1]", '{"model": ', '{"added_tokens": true}', '"x"'])
def test_damaged_tokenizer(directory, damage):
    (directory / "tokenizer.json").write_text(damage)
    fails(directory, "no tokenizer can be opened", then=lambda c: c.tokenizer())
