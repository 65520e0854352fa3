"""Formats of files: valid tiny ones, how each is mutated, and how each is read."""

import dataclasses
import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import data_files as data
import model_files as models
import mutations as m
import own_files as own
import tiny_gguf
from mutations import on, on_bytes, on_json


@dataclasses.dataclass(frozen=True)
class Format:
    """A format of files.

    Attributes:
      build: writes valid files into a directory.
      read: reads everything of the directory; returns a tree of arrays and plain values.
      kinds: kind of mutation -> function of a generator and the directory, which changes a file.
      checked: kinds of mutation after which no other value may be read, because checksums tell.
      says: arrays of the parameters as another program reads them, in any order and layout. What is
        read must be the same numbers wherever the format has no checksums. None: not compared.
    """

    build: Callable[[Path], Any]
    read: Callable[[Path], Any]
    kinds: dict[str, Callable[[Any, Path], None]]
    checked: frozenset[str] = frozenset()
    says: Callable[[Path], list[Any]] | None = None


MODEL_FILES = {
    "config": on_json("config.json"),
    "generation": on_json("generation_config.json"),
    "tokenizer": on("tokenizer.json", m.edit_json, m.edit_json, m.swap_values, m.flip_bits),
    "tokenizer config": on_json("tokenizer_config.json"),
}


def lines(name, rows, read):
    kinds = {**on_bytes(name), "records": on(name, m.edit_lines)}
    return Format(data.write(name, rows), read, kinds)


FORMATS = {
    "safetensors": Format(
        models.safetensors,
        models.read_model,
        {
            **on_bytes("*.safetensors"),
            "header edits": on("*.safetensors", m.edit_safetensors),
            "index": on("model.safetensors.index.json", m.edit_json, m.swap_values),
            **MODEL_FILES,
        },
        says=models.of_safetensors,
    ),
    "torch zip": Format(
        models.torch_file(True),
        models.read_model,
        {**on_bytes("*.bin"), "members": on("*.bin", models.rezip)},
        frozenset(on_bytes("")),
        says=models.of_torch,
    ),
    "torch legacy": Format(
        models.torch_file(False), models.read_model, on_bytes("*.bin"), says=models.of_torch
    ),
    "adapter": Format(
        models.adapter,
        models.read_model,
        {
            **on_bytes("adapter_model.safetensors"),
            "header edits": on("adapter_model.safetensors", m.edit_safetensors),
            "config": on_json("adapter_config.json"),
        },
    ),
    "gguf": Format(
        lambda directory: tiny_gguf.write(directory / "model.gguf", "Q4_0"),
        lambda directory: models.read_model(directory, "model.gguf"),
        {**on_bytes("*.gguf"), "header edits": on("*.gguf", m.edit_gguf)},
        says=models.of_gguf,
    ),
    "gguf sentencepiece": Format(
        models.gguf_sentence_piece,
        lambda directory: models.read_model(directory, "model.gguf"),
        {**on_bytes("*.gguf"), "header edits": on("*.gguf", m.edit_gguf)},
        says=models.of_gguf,
    ),
    "own": Format(
        own.own,
        own.read_own,
        {
            **on_bytes("*.safetensors"),
            "header edits": on("*.safetensors", m.edit_safetensors),
            "index": on("model.safetensors.index.json", m.edit_json, m.swap_values),
            "config": on_json("config.json"),
            "plan": on_json("plan.json"),
            "report": on_json("report.json"),
        },
        frozenset({*on_bytes(""), "header edits", "index", "config", "plan", "report"}),
    ),
    "elastic": Format(
        own.elastic,
        own.read_elastic,
        {
            **on_bytes("elastic/entries/*"),
            "index": on("elastic/index.json", m.edit_json, m.swap_values),
            "entries": own.forge_entry,
            "config": on_json("config.json"),
        },
        frozenset({*on_bytes(""), "config", "index"}),
    ),
    "journal": Format(
        own.journal,
        own.read_journal,
        {
            **on_bytes("out.partial/*"),
            "lines": own.forge_line,
            "links": own.plant_links,
            "entries": on("out.partial/entries/*", m.flip_bits, m.edit_safetensors, m.truncate),
            "shards": on("out.partial/model/*", m.flip_bits, m.edit_safetensors, m.truncate),
            "identity": on_json("out.partial/run.json"),
        },
        frozenset({*on_bytes(""), "links", "entries", "shards"}),
    ),
    "parameters": Format(
        own.parameters,
        own.read_parameters,
        {
            **on_bytes("saved/*.safetensors"),
            "header edits": on("saved/*.safetensors", m.edit_safetensors),
            "manifest": on_json("saved/*.json"),
        },
        frozenset({*on_bytes(""), "header edits"}),
    ),
    "npy": Format(
        data.write("ids.npy", data.npy),
        data.read_windows("ids.npy"),
        {
            **on_bytes("*.npy"),
            "header edits": on("*.npy", m.edit_npy),
            "arrays": on("*.npy", data.other_array),
        },
    ),
    "jsonl": lines("a.jsonl", data.LINES, data.read_windows("a.jsonl")),
    "gz": Format(
        data.write("a.jsonl.gz", lambda: gzip.compress(data.LINES)),
        data.read_windows("a.jsonl.gz"),
        {**on_bytes("*.gz"), "content": on("*.gz", data.regzip)},
        frozenset(on_bytes("")) - {"bytes"},  # a file twice is a valid file of two members
    ),
    "conversations": lines("chats.jsonl", data.chats_lines, data.read_chats),
    "questions": lines("boolq.jsonl", data.questions, data.read_tasks),
    "problems": lines("problems.jsonl", data.problems, data.read_programs),
    "labels": Format(data.labelled, data.read_labelled, on_bytes("labels.tsv")),
    "plan": Format(own.plan, own.read_plan, {**on_bytes("*.json"), "values": on_json("*.json")}),
}
