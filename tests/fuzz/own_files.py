"""Tiny directories as lordjax writes them, finished and not, and how they are read."""

import dataclasses
import hashlib
import json
import zlib

import jax
import mutations as m
import numpy as np
from chats import make_tokenizer
from model_files import CONFIG, read_model
from mutations import on

from lordjax.kernels import trees


def own(directory):
    from saved_models import CONFIG as OWN
    from saved_models import model, quantized

    from lordjax import save
    from lordjax.allocation.plan import Plan

    params = trees.flatten(model()) | {
        path: leaf for path, leaf in trees.flatten(quantized()).items() if "/mlp/up/" in path
    }
    plan = Plan("lord", {"layer_0/attention/q/kernel": 3}, 0.5, "uniform", formats={"a": "nf4"})
    save(
        directory / "new",
        OWN,
        trees.unflatten(params),
        hf_config={key: CONFIG[key] for key in ("architectures", "model_type")},
        plan=plan,
        report={"plan": {"kept": 0.5}},
        shard_bytes=8000,
        write_tokenizer=lambda folder: make_tokenizer().save_pretrained(folder),
    )
    for file in (directory / "new").iterdir():
        file.rename(directory / file.name)
    (directory / "new").rmdir()


def read_own(directory):
    from lordjax.storage.saved_model import open_saved

    saved = open_saved(directory)
    return read_model(directory) | {"report": saved.report(), "plan": repr(saved.plan())}


def elastic(directory):
    from interrupted import TOKENS, small_model

    from lordjax.compression import elastic
    from lordjax.compression.resumable_output import Output

    with Output(directory / "new", {"made of": "test"}) as output:
        result = elastic.compress(
            small_model(), TOKENS, work=output.store, into=output.shards, method="svd"
        )
        output.finish(
            result, hf_config={}, also=lambda stage: elastic.keep_entries(output.store, stage)
        )
    for file in (directory / "new").iterdir():
        file.rename(directory / file.name)
    (directory / "new").rmdir()


def read_elastic(directory):
    from lordjax.compression import elastic

    config, params = elastic.load(directory, 0.6)
    return {"config": repr(config), "params": params}


def forge_entry(rng, directory):
    """A changed entry of an elastic model, with a checksum that is right in the index."""
    index = directory / "elastic" / "index.json"
    content = json.loads(index.read_text())
    row = rng.choice([row for row in content["entries"].values() if "file" in row])
    on(f"elastic/{row['file']}", m.edit_safetensors, m.flip_bits, m.resize)(rng, directory)
    data = (directory / "elastic" / row["file"]).read_bytes()
    row |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    index.write_text(json.dumps(content))


IDENTITY = {"made of": "test", "keep": 0.5}


def journal(directory):
    from lordjax.compression.resumable_output import Output

    output = Output(directory / "out", IDENTITY)
    output.store["statistics/a"] = {"x": np.arange(6.0), "rows": [1, (2, "b")]}
    output.store["statistics/a"] = {"x": np.arange(7.0), "rows": [1, (2, "b")]}
    output.store["number"] = 3
    output.store["gone"] = np.ones(3)
    output.store.discard("gone")
    output.shards["rest"] = {"embed": np.ones((4, 3), np.float32)}
    output.shards["layer_0"] = {"kernel": np.ones((3, 3), np.float32)}
    output.store.close()


def read_journal(directory):
    """What a resumed run does: reads entries, replaces one, gives the shards their names."""
    from lordjax.compression.resumable_output import Output

    with Output(directory / "out", IDENTITY) as output:
        keys = output.store.below("")
        found = {key: jax.tree.map(np.array, output.store[key]) for key in keys}
        output.store["statistics/a"] = np.zeros(2)
        output.store.discard("number")
        named = output.shards.finish(["rest", "layer_0"])
        model = directory / "out.partial" / "model"
        return {**found, "index": named, "files": [f.read_bytes() for f in sorted(model.iterdir())]}


def forge_line(rng, directory):
    """A changed line of the journal whose checksum is right."""
    file = directory / "out.partial" / "journal.jsonl"
    lines = file.read_bytes().splitlines()
    at = rng.randrange(len(lines))
    row = json.loads(lines[at].split(b" ", 1)[1])
    if rng.random() < 0.5:
        victim = "../../../outside/victim"
        victim = rng.choice((victim, victim[3:], str(directory.parent / "outside" / "victim")))
        text = json.dumps(row)
        name = rng.choice((row.get("file", ""), "rest-0.safetensors", "layer_0-0.safetensors"))
        text = text.replace(name, victim).encode() if name else text.encode()
    else:
        text = m.edit_json(rng, json.dumps(row).encode())
    lines[at] = b"%08x %s" % (zlib.crc32(text), text)
    file.write_bytes(b"\n".join(lines) + b"\n")


def plant_links(rng, directory):
    """A file or folder of the unfinished output is a link to something outside."""
    partial, outside = directory / "out.partial", directory.parent / "outside"
    name = rng.choice(
        ("journal.jsonl", "run.json", "lock", "entries", "model", "run.json.new", "entries/x")
    )
    m.plant_link(partial / name, outside)


def parameters(directory):
    from lordjax.functions.saving import save_params

    save_params(directory / "saved", {"a": np.ones((3, 4), np.float32), "b": [np.arange(3)]})


def read_parameters(directory):
    from lordjax.functions.saving import load_params

    return load_params(directory / "saved")


def plan(directory):
    from lordjax.allocation.plan import Plan

    made = Plan("lord", {"layer_0/attention/q/kernel": 3, "b": None}, 0.5, "uniform", gap=0.1)
    dataclasses.replace(made, formats={"a": "nf4"}, predicted={"in_sample": 1.0}).write(
        directory / "plan.json"
    )


def read_plan(directory):
    from lordjax.allocation.plan import Plan

    return repr(Plan.read(directory / "plan.json"))


SETTINGS = {"model": "a", "samples": 2, "windows": 3}


def demo(directory):
    from lordjax.scripts.verbs.demo import write_record

    row = {"name": "dense", "bytes": 10, "perplexity": 3.5}
    write_record(directory, SETTINGS, {"dense": row})


def read_demo(directory):
    from lordjax.scripts.verbs.demo import finished_rows

    return finished_rows(directory, SETTINGS)
