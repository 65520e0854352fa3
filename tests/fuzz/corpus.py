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
import run_files as runs
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
      needs: package that must be installed.
    """

    build: Callable[[Path], Any]
    read: Callable[[Path], Any]
    kinds: dict[str, Callable[[Any, Path], None]]
    checked: frozenset[str] = frozenset()
    says: Callable[[Path], list[Any]] | None = None
    needs: str | None = None


MODEL_FILES = {
    "config": on_json("config.json"),
    "generation": on_json("generation_config.json"),
    "tokenizer": on("tokenizer.json", m.edit_json, m.edit_json, m.swap_values, m.flip_bits),
    "tokenizer config": on_json("tokenizer_config.json"),
}


def lines(name, rows, read):
    kinds = {**on_bytes(name), "records": on(name, m.edit_lines)}
    return Format(data.write(name, rows), read, kinds)


def parquet(name, rows, read):
    kinds = {**on_bytes(name), "records": on(name, data.repack)}
    return Format(data.write(name, data.parquet(rows)), read, kinds, needs="pyarrow")


def tokenizer(build, *names):
    """A tokenizer without ``tokenizer.json``."""
    kinds = {"config": MODEL_FILES["tokenizer config"]}
    for name in names:
        kinds |= {f"{kind} in {name}": change for kind, change in on_bytes(name).items()}
    return Format(build, models.read_tokenizer, kinds)


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
    "gguf parts": Format(
        models.gguf_parts,
        lambda directory: models.read_model(directory, "model-00001-of-00002.gguf"),
        {**on_bytes("*.gguf"), "header edits": on("*.gguf", m.edit_gguf)},
        says=models.of_gguf,
    ),
    "pair tokenizer": tokenizer(models.pair_tokenizer, "vocab.json", "merges.txt"),
    "word tokenizer": tokenizer(models.word_tokenizer, "vocab.txt"),
    "chat template": Format(
        models.chat_template,
        models.read_chat,
        {
            **on_bytes("chat_template.jinja"),
            "programs": on("chat_template.jinja", models.edit_template),
        },
    ),
    "orbax": Format(
        models.orbax,
        models.read_orbax,
        {**on_bytes("params/**/*"), "manifest": on_json("manifest.json")},
        frozenset({*on_bytes(""), "manifest"}),
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
            "dense part": on("*.safetensors", m.flip_bits, m.edit_safetensors, m.truncate),
            "config": on_json("config.json"),
        },
        frozenset({*on_bytes(""), "config", "index", "dense part"}),
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
    "run": Format(
        runs.run,
        runs.read_run,
        {
            **on_bytes("out.run/checkpoints/**/*"),
            "metadata": on("out.run/checkpoints/**/*META*", m.edit_json),
            "facts": on("out.run/checkpoints/*/metrics/metrics", m.edit_json, m.swap_values),
            "identity": on_json("out.run/run.json"),
            "metrics": on("out.run/metrics.jsonl", m.edit_lines, m.flip_bits, m.truncate),
            "lost checkpoints": runs.lose,
            "links": runs.plant_links,
        },
        frozenset({*on_bytes(""), "metadata", "facts", "identity", "lost checkpoints", "links"}),
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
    "parquet": parquet("a.parquet", data.records, data.read_windows("a.parquet")),
    "text": Format(
        data.write("a.txt", "\n".join(data.TEXTS * 3).encode()),
        data.read_windows("a.txt"),
        on_bytes("a.txt"),
    ),
    "conversations": lines("chats.jsonl", data.chats_lines, data.read_chats("chats.jsonl")),
    "conversations list": Format(
        data.write("chats.json", data.chats_list),
        data.read_chats("chats.json"),
        {**on_bytes("chats.json"), "values": on_json("chats.json")},
    ),
    "conversations parquet": parquet(
        "chats.parquet", data.chat_records, data.read_chats("chats.parquet")
    ),
    "questions": lines("boolq.jsonl", data.questions, data.read_tasks),
    "problems": lines("problems.jsonl", data.problems, data.read_programs),
    "labels": Format(data.labelled, data.read_labelled, on_bytes("labels.tsv")),
    "demo": Format(own.demo, own.read_demo, {**on_bytes("*.json"), "values": on_json("*.json")}),
    "plan": Format(own.plan, own.read_plan, {**on_bytes("*.json"), "values": on_json("*.json")}),
}
