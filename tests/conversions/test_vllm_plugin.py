"""The plugin of vLLM against a stub of its published interface."""

import importlib
import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
import vllm_stub
from hf_models import hf_model
from safetensors.torch import load_file

from lordjax import factorize, materialize, save
from lordjax.conversions import vllm_plugin
from lordjax.conversions.exporters.export import export
from lordjax.conversions.exporters.verify import check_installed
from lordjax.conversions.readers.checkpoint import open_checkpoint
from lordjax.kernels import trees
from lordjax.kernels.convert import encode
from lordjax.kernels.low_rank import LowRank
from lordjax.kernels.quantized import LowRankPlusQuantized
from lordjax.storage.saved_model import open_saved

HIDDEN, HEADS, KEYS, HEAD, WIDTH = 32, 4, 2, 8, 48


def pairs(flat):
    return trees.flatten(factorize(trees.unflatten(flat), keep=0.6, where="layer_.*kernel"))


def codes(flat):
    return trees.flatten(encode(trees.unflatten(flat), "nf3", where="layer_.*kernel"))


def sums(flat):
    rng, found = np.random.default_rng(0), codes(flat)
    for path, leaf in found.items():
        if path.startswith("layer_") and path.endswith("kernel"):
            sides = (leaf.shape[0], 3), (3, leaf.shape[1])
            left, right = (rng.normal(size=side).astype(np.float32) / 9 for side in sides)
            found[path] = LowRankPlusQuantized(leaf, LowRank(left, right))
    return found


def narrow(flat):
    """Other ranks in every layer, an MLP of 20 neurons, queries as they are."""
    found = dict(flat)
    for name in ("gate", "up"):
        found[f"layer_0/mlp/{name}/kernel"] = flat[f"layer_0/mlp/{name}/kernel"][:, :20]
    found["layer_0/mlp/down/kernel"] = flat["layer_0/mlp/down/kernel"][:20]
    few = factorize(trees.unflatten(flat), keep=0.3, where=".*attention/k/kernel")
    return found | {p: a for p, a in trees.flatten(few).items() if "attention/k" in p}


VARIANTS = {f.__name__: f for f in (pairs, codes, sums, narrow)}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    directory = tmp_path_factory.mktemp("vllm")
    hf_model("llama", {}).save_pretrained(directory / "in")
    checkpoint = open_checkpoint(directory / "in")

    def make(name):
        flat = VARIANTS[name](trees.flatten(checkpoint.params()))
        target = directory / name
        if not target.exists():
            save(target, checkpoint.config, trees.unflatten(flat), hf_config=checkpoint.hf_config)
            export(open_saved(target), directory / f"{name}-vllm", "vllm")
        return open_saved(target), directory / f"{name}-vllm"

    return make


def layers(monkeypatch, directory, rank, ranks):
    """The linear layers of the first block on a rank, loaded."""
    vllm_stub.install(monkeypatch)
    config = importlib.import_module("lordjax.conversions.vllm_plugin.config")
    vllm_plugin.register()
    given = json.loads((directory / "config.json").read_text())["quantization_config"]
    found = vllm_stub.REGISTERED["lordjax"].from_config(given)
    assert isinstance(found, config.LordjaxConfig) and given["quant_method"] == found.get_name()
    queries, keys = (HEADS * HEAD, HEAD), (KEYS * HEAD, HEAD)
    shapes = {
        "self_attn.qkv_proj": (HIDDEN, [queries, keys, keys], "outputs"),
        "self_attn.o_proj": (HEADS * HEAD, [(HIDDEN, 1)], "inputs"),
        "mlp.gate_up_proj": (HIDDEN, [(WIDTH, 1), (WIDTH, 1)], "outputs"),
        "mlp.down_proj": (WIDTH, [(HIDDEN, 1)], "inputs"),
    }
    made = {}
    for name, (inputs, outputs, split) in shapes.items():
        full = f"model.layers.0.{name}"
        made[full] = vllm_stub.LinearBase(found, full, inputs, outputs, rank, ranks, split=split)
    tensors = load_file(directory / "model.safetensors")
    vllm_stub.load(made, {n: t for n, t in tensors.items() if n.startswith("model.layers.0.")})
    return {name.removeprefix("model.layers.0."): layer for name, layer in made.items()}


def padded(kernel, shape):
    """A dense kernel in its original shape: pruned neurons are the last ones."""
    full = np.zeros(shape, np.float32)
    dense = np.asarray(materialize(kernel))
    full[: dense.shape[0], : dense.shape[1]] = dense
    return full


@pytest.mark.quick("sums-2")
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_rank_computes_its_part(exported, monkeypatch, variant, ranks):
    """Outputs of merged layers side by side, and a sum where the inputs are shared out."""
    saved, directory = exported(variant)
    block = trees.flatten(saved.block(0))
    kernel = {
        name: padded(block[f"{path}/kernel"], shape)
        for name, path, shape in (
            *((n, f"attention/{n}", (HIDDEN, HEAD * (HEADS if n == "q" else KEYS))) for n in "qkv"),
            ("o", "attention/o", (HEADS * HEAD, HIDDEN)),
            *((n, f"mlp/{n}", (HIDDEN, WIDTH)) for n in ("gate", "up")),
            ("down", "mlp/down", (WIDTH, HIDDEN)),
        )
    }
    rng = np.random.default_rng(1)
    x, z, h = (rng.normal(size=(5, n)).astype(np.float32) for n in (HIDDEN, HEADS * HEAD, WIDTH))
    sums = {"self_attn.o_proj": 0.0, "mlp.down_proj": 0.0}
    with torch.inference_mode():
        for rank in range(ranks):
            own = layers(monkeypatch, directory, rank, ranks)
            assert all(not hasattr(layer, "parts") for layer in own.values())
            for name, parts, heads in (
                ("self_attn.qkv_proj", "qkv", (HEADS, KEYS, KEYS)),
                ("mlp.gate_up_proj", ("gate", "up"), (WIDTH, WIDTH)),
            ):
                found = own[name](torch.from_numpy(x)).numpy()
                expected = []
                for part, count in zip(parts, heads, strict=True):
                    groups = np.split(x @ kernel[part], min(ranks, count), axis=1)
                    expected.append(groups[rank * len(groups) // ranks])
                np.testing.assert_allclose(found, np.concatenate(expected, 1), atol=2e-5)
            for name, value in (("self_attn.o_proj", z), ("mlp.down_proj", h)):
                share = np.split(value, ranks, axis=1)[rank]
                sums[name] = sums[name] + own[name](torch.from_numpy(share)).numpy()
    np.testing.assert_allclose(sums["self_attn.o_proj"], z @ kernel["o"], atol=5e-5)
    np.testing.assert_allclose(sums["mlp.down_proj"], h @ kernel["down"], atol=5e-5)


@pytest.mark.full
def test_a_rank_keeps_its_part_of_pairs(exported, monkeypatch):
    _, directory = exported("pairs")
    sizes = []
    for ranks in (1, 2):
        own = layers(monkeypatch, directory, 0, ranks)
        down, up = own["mlp.down_proj"].shards[0], own["mlp.gate_up_proj"].shards[1]
        sizes.append((down.parts[0].left.weight.numel(), up.parts[0].right.weight.numel()))
    assert sizes[0] == (2 * sizes[1][0], 2 * sizes[1][1])


@pytest.mark.full
def test_wrong_checkpoints(exported, monkeypatch):
    _, directory = exported("pairs")
    own = layers(monkeypatch, directory, 0, 1)
    method = own["mlp.down_proj"].quant_method
    with pytest.raises(ValueError, match=r"down_proj: parts.0.left.weight of matrix 0 has shape"):
        method._load("parts.0.left.weight", None, torch.zeros(2, 2))
    with pytest.raises(ValueError, match="expected no such tensor"):
        method._load("parts.9.weight", None, torch.zeros(2, 2))
    method.missing = [{"parts.0.left.weight"}]
    with pytest.raises(ValueError, match=r"the checkpoint has no parts.0.left.weight; export"):
        method.process_weights_after_loading(own["mlp.down_proj"])
    with pytest.raises(ValueError, match="format 7, expected 1"):
        vllm_stub.REGISTERED["lordjax"].from_config({"format": 7, "linears": {}})


def test_what_vllm_cannot_hold_is_refused(exported, tmp_path):
    saved, _ = exported("pairs")
    flat = trees.flatten(saved.params()) | {"layer_1/attention/o/bias": np.ones(32, np.float32)}
    save(tmp_path / "a", saved.config, trees.unflatten(flat), hf_config=saved.hf_config)
    with pytest.raises(ValueError, match=r"no place for 1 biases .*; export with --to factored"):
        export(open_saved(tmp_path / "a"), tmp_path / "out", "vllm")
    hf_model("gpt2", {}).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match=r"vllm exports are those of .* not gpt2 with head"):
        export(open_checkpoint(tmp_path / "gpt2"), tmp_path / "out", "vllm")
    with pytest.raises(ImportError, match=r"--verify does not run vllm; .* --to factored"):
        check_installed("vllm")


def test_the_entry_point_is_the_function():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    name = project["entry-points"]["vllm.general_plugins"]["lordjax"]
    module, _, function = name.partition(":")
    assert getattr(importlib.import_module(module), function) is vllm_plugin.register
    assert project["optional-dependencies"]["vllm"]
