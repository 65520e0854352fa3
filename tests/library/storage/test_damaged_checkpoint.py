"""Damaged saved models: every error names the damage."""

import json

import jax.numpy as jnp
import pytest
from saved_models import HF_CONFIG, edit, quantized, write

from lordjax import LowRank, load
from lordjax.storage.checkpoint import INDEX


def first_shard(directory):
    return min(directory.glob("*.safetensors"))


def truncate(directory):
    shard = first_shard(directory)
    shard.write_bytes(shard.read_bytes()[:-100])


def empty_shard(directory):
    first_shard(directory).write_bytes(b"")


def remove_shard(directory):
    first_shard(directory).unlink()


def swap_tensors(directory):
    def change(index):
        files = sorted(set(index["weight_map"].values()))
        index["weight_map"] = dict.fromkeys(index["weight_map"], files[0])

    edit(directory / INDEX, change)


def drop_factor(directory):
    edit(directory / INDEX, lambda index: index["weight_map"].pop("layer_0/mlp/up/kernel/left"))


def drop_kernel(directory):
    def change(index):
        for side in ("left", "right"):
            index["weight_map"].pop(f"layer_0/mlp/up/kernel/{side}")

    edit(directory / INDEX, change)


def in_config(**fields):
    return lambda d: edit(d / "config.json", lambda config: config["lordjax"].update(fields))


def write_text(name, text):
    return lambda directory: (directory / name).write_text(text)


DAMAGES = {
    "truncated shard": (truncate, "model-00001-of-"),
    "empty shard": (empty_shard, "model-00001-of-"),
    "missing shard": (remove_shard, "missing: .*model-00001-of-"),
    "tensors in another file": (swap_tensors, "model-00001-of-"),
    "no index": (lambda d: (d / INDEX).unlink(), INDEX),
    "broken index": (write_text(INDEX, '{"weight_map": {"a'), INDEX),
    "binary index": (lambda d: (d / INDEX).write_bytes(b"\xff\xfe\x00"), INDEX),
    "index without a map": (write_text(INDEX, "{}"), INDEX),
    "index of another shape": (write_text(INDEX, "[1, 2]"), INDEX),
    "index that maps to numbers": (write_text(INDEX, '{"weight_map": {"a": 1}}'), INDEX),
    "factor left out": (drop_factor, "layer_0/mlp/up/kernel/left"),
    "kernel left out": (drop_kernel, "layer_0/mlp/up/kernel/left"),
    "newer format": (in_config(format=99), "format 99, .* upgrade lordjax"),
    "unknown kind": (in_config(kinds={"a": "holographic"}), "holographic.* upgrade lordjax"),
    "no model": (in_config(model=None), "config.json"),
    "unknown model field": (in_config(model={"rope": {}, "colour": 1}), "config.json"),
    "entry is no table": (write_text("config.json", '{"lordjax": null}'), "config.json"),
    "no entry": (write_text("config.json", json.dumps(HF_CONFIG)), "no config.json with"),
    "broken config": (write_text("config.json", '{"lordjax": {'), "config.json: not JSON"),
    "config is a number": (write_text("config.json", "3"), "config.json: expected a JSON object"),
    "no config": (lambda d: (d / "config.json").unlink(), "no config.json with"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(tmp_path, damage):
    write(tmp_path / "out")
    change, message = DAMAGES[damage]
    change(tmp_path / "out")
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path / "out")
    assert str(tmp_path / "out") in str(caught.value)


QUANTISED = "layer_0/attention/q/kernel"

INNER = "layer_1/mlp/up/kernel/low_rank/left"


def constants(path, **fields):
    def change(config):
        config["lordjax"]["constants"][path].update(fields)

    return lambda directory: edit(directory / "config.json", change)


def drop_constants(*keys):
    def change(config):
        table = config["lordjax"]
        for key in keys[:-1]:
            table = table[key]
        del table[keys[-1]]

    return lambda directory: edit(directory / "config.json", change)


def drop_tensor(path):
    return lambda directory: edit(directory / INDEX, lambda index: index["weight_map"].pop(path))


def no_tables(config):
    config["lordjax"]["constants"][QUANTISED] = [1, 2]


CODE_DAMAGES = {
    "no constants": (drop_constants("constants"), f"missing: .*{QUANTISED}/fan_in"),
    "a kernel without constants": (
        drop_constants("constants", INNER),
        f"missing: .*{INNER}/format",
    ),
    "no format": (drop_constants("constants", INNER, "format"), f"missing: {INNER}/format$"),
    "constants are a list": (in_config(constants=[1]), "config.json: damaged"),
    "constants are nothing": (in_config(constants=None), "config.json: damaged"),
    "constants of a kernel are a list": (
        lambda d: edit(d / "config.json", no_tables),
        "config.json: damaged",
    ),
    "no such format": (constants(INNER, format="int4"), f"{INNER}: 'int4' is no format"),
    "format is a number": (constants(QUANTISED, format=4), f"{QUANTISED}: "),
    "other format": (constants(INNER, format="nf4-4-bfloat16-16-16"), f"{INNER}/codes: expected"),
    "other blocks": (constants(INNER, format="nf3-4-bfloat16-16-1"), f"{INNER}/supers: expected"),
    "other size": (constants(QUANTISED, fan_in=400), f"{QUANTISED}/codes: expected"),
    "size is a text": (constants(QUANTISED, fan_in="16"), f"{QUANTISED}: fan_in"),
    "size is negative": (constants(QUANTISED, fan_in=-16, fan_out=-16), f"{QUANTISED}: fan_in"),
    "other shape": (
        constants("layer_1/mlp/up/kernel/base", fan_in=24, fan_out=16),
        "expected equal shapes",
    ),
    "unknown constant": (constants(QUANTISED, colour=3), f"{QUANTISED}: .*colour"),
    "tensor left out": (drop_tensor(f"{INNER}/offset"), f"missing: {INNER}/offset$"),
}


@pytest.mark.parametrize("damage", CODE_DAMAGES)
def test_damage_of_quantised_kernels_is_named(tmp_path, damage):
    write(tmp_path / "out", quantized(), shard_bytes=2**30)
    change, message = CODE_DAMAGES[damage]
    change(tmp_path / "out")
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path / "out")
    assert str(tmp_path / "out") in str(caught.value) and "\n" not in str(caught.value)


def test_factors_that_do_not_fit_are_named(tmp_path):
    params = {"a": {"kernel": LowRank(jnp.ones((4, 2)), jnp.ones((3, 4)))}}
    write(tmp_path / "out", params)
    with pytest.raises(ValueError, match=r"a/kernel: left \(4, 2\) and right \(3, 4\)"):
        load(tmp_path / "out")
